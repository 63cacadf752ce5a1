"""Draw images of a prompt.

examples:
  ldm generate "a cat"                             writes a-cat.png
  ldm generate "a cat on a red background" -n 4 --seed 7 -o cats/
  ldm generate "a red car" -o car.webp --steps 40 --guidance-scale 4
  ldm generate "a cat" --fast                      in a few steps
  ldm generate "a dog" --model runs/unet/model --no-metadata
  ldm generate "a dog" --image cat.png --mask-image where.png
  ldm generate "a cat" --controlnet canny/ --control-image edges:photo.png
  ldm generate "a cat" --model sd15/ --ip-adapter ip-adapter_sd15.safetensors --ip-adapter-image style.png
  ldm generate "a landscape" --image small.png --outpaint left=64,right=64
  ldm generate --from old.png                      draws that image again: by ldm, A1111 and its relatives
  ldm generate --from old.png --set steps=50 --set sampler=euler

Image k of -n has seed SEED + k and is the same alone or among others. Only the file that -o names is ever
overwritten. The paths of the written files are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from ldm import console
from ldm.cli.options import OF_CONTROL, OF_MODEL, PIPELINES, SAMPLING, add_drawing, names_of, with_controls
from ldm.device import without_collector
from ldm.errors import ConfigError, LdmError
from ldm.pipeline.keywords import ALIASES, BATCH, EDITING_WORDS, GUIDANCE_OPTIONS

INTERVALS = ("guidance_interval", "guidance_sigma_interval")
FROM_CALL = ("seed", "num_images", "batch_size", "strict", *SAMPLING, *EDITING_WORDS, *OF_CONTROL)
TEMPLATE = re.compile(r"\{[^{}]*\|[^{}]*\}|(?<![^\W_])__[^\W_][^_\n]*__(?![^\W_])")  # {a|b}, __name__
# Option -> what an image says in its place
REPLACED = dict.fromkeys(("num_inference_steps", "spacing"), ("timesteps", "sigmas"))
REPLACED |= dict.fromkeys(("timesteps", "sigmas"), ("timesteps", "sigmas", "num_inference_steps", "spacing"))
REPLACED |= dict.fromkeys(INTERVALS, INTERVALS)
FROM_PIPELINE = ("prompt", "negative_prompt", *PIPELINES, *OF_MODEL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what to draw")
    add("-o", "--output", metavar="PATH", help="a file (.png .jpg .webp) or a folder; default: named by the prompt")
    add("-n", *names_of("num_images"), type=int, default=1, metavar="N", help="images to draw (1)")
    add("--seed", type=int, metavar="N", help="of the first image; -1 or nothing: drawn, and kept in the file")
    add("--batch-size", metavar="N", type=int, help=f"images drawn together ({BATCH}); on a CPU it changes no image")
    strict = "refuse prompts that the model does not see as a whole, instead of a warning"
    add("--strict", action="store_true", help=strict)
    add("--format", metavar="NAME", help="png, jpg, webp (by the name of the file, or png)")
    add("--no-metadata", action="store_true", help="write nothing about prompt and settings into the files")
    add("--from", dest="source", metavar="IMAGE", help="draw it again, as its file says; options given here win")
    changes = "with --from: another value, in the words of prompt lines; may be given several times"
    add("--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help=changes)
    add_drawing(parser)
    words = ", ".join(f"{word} = {name}" for word, name in ALIASES.items())
    notes = textwrap.fill(f"In Python, other tools' names are accepted too: {words}.", 118)
    parser.epilog = f"{parser.epilog}\n\n{notes}"


def run(args: argparse.Namespace) -> int:
    with without_collector():
        from ldm.pipeline.pipeline import Pipeline
        from ldm.pipeline.result import Images, Target

    own, call, original = _settings(args)
    target = Target.of(args.output, args.format).check()
    pipe = Pipeline(**own)
    try:
        images = pipe.generate(**call)
    except (LdmError, KeyboardInterrupt) as stop:
        with contextlib.suppress(LdmError):  # the error that stopped the work is shown, not this one
            _write(getattr(stop, "images", Images([], [])), target, args)
        raise
    _write(images, target, args)
    if original:
        _warn_of_differences(original, images.metadata[0])
    first, seeds = images.metadata[0], ", ".join(map(str, images.seeds[:8]))
    steps = f"{first['num_inference_steps']} steps of {first['sampler']}"
    console.say(f"{steps}, {first['device']} in {first['dtype']}, seeds {seeds}", verbosity=1)
    return 0


def _settings(args: argparse.Namespace) -> tuple[dict, dict, Mapping]:
    """(keywords of Pipeline, of generate, what the image of --from says of its model and machine)."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if args.source is not None:  # what the image says is in place of defaults
        given = {name: value for name, value in given.items() if name in args.typed}
    given = with_controls(given)
    own, call = ({name: given[name] for name in part if name in given} for part in (FROM_PIPELINE, FROM_CALL))
    if args.source is not None:
        return _replayed(args, own, call)
    if args.prompt is None or args.changes:
        what = "--set belongs to --from" if args.changes else "there is no prompt"
        raise ConfigError(what, hint='write ldm generate "a cat", or --from IMAGE')
    if "--" in args.prompt or "—" in args.prompt:
        _warn_of_flags(args.prompt)
    if match := TEMPLATE.search(args.prompt):
        console.warn(f"{match[0]!r:.60} is drawn as text: choices and wildcards are for prompt files, ldm render FILE")
    return own, call, {}


def _replayed(args: argparse.Namespace, own: dict, call: dict) -> tuple[dict, dict, Mapping]:
    """What the image of --from says, with the options that are given in its place."""
    from ldm.render.replay.replay import fitted_to, keywords, read_replays

    replays = list(itertools.islice(read_replays([args.source], args.changes), 2))
    if len(replays) > 1:
        raise ConfigError("holds several images", where=args.source, hint="draw them with ldm render --from")
    replay = fitted_to(replays[0], args.model, args.changes)
    said = keywords(replay)
    for note in replay.notes:
        console.warn(note)
    return {**said[0], **own}, {**_kept(said[1], call), **call}, replay.source


def _kept(said: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The image's settings for generate, without those that cannot be beside what is `given`."""
    from ldm.diffusion import names

    gone = {name for word in given for name in REPLACED.get(word, ())}
    if given.get("guidance", said.get("guidance", "cfg")) != said.get("guidance", "cfg"):
        gone |= set(GUIDANCE_OPTIONS)  # of another kind
    if "sampler" in given:
        sampler, spacing = names.resolve(given["sampler"])
        gone |= {"spacing"} if spacing else set()  # DPM++ 2M Karras
        gone |= {"eta"} if sampler != said.get("sampler") else set()
    return {name: value for name, value in said.items() if name not in gone}


def _warn_of_flags(prompt: str) -> None:
    """Prompt files take flags inside a line; here they are drawn as words."""
    from ldm.render.prompts.line_parser import flags_in

    for flag in flags_in(prompt):
        console.warn(f"{flag} inside the prompt is drawn as text; give it as an option, behind the quotes")


def _warn_of_differences(original: Mapping, now: Mapping) -> None:
    from ldm.render.replay.replay import differences

    for line in differences(original, now):
        console.warn(line)


def _write(images: Any, target: Any, args: argparse.Namespace) -> None:
    for path in images.save_each(target, metadata=not args.no_metadata):
        if not args.quiet:
            print(path, flush=True)
