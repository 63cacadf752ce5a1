"""Draw pictures of a prompt.

examples:
  ldm generate "a cat"                             writes a-cat.png
  ldm generate "a cat on a red ground" -n 4 --seed 7 -o cats/
  ldm generate "a red car" -o car.webp --steps 40 --guidance-scale 4
  ldm generate "a dog" --model runs/unet/model --no-metadata
  ldm generate --from old.png                      draws that picture again: by ldm, A1111 and its relatives
  ldm generate --from old.png --set steps=50 --set sampler=euler

Picture k of -n has seed SEED + k and is the same alone or among others. Files that exist are never overwritten, but for
the one that -o names. The paths of what was written are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import textwrap
from collections.abc import Mapping

from ldm import console
from ldm.errors import ConfigError, LdmError
from ldm.pipeline import Images, Pipeline
from ldm.pipeline.result import Target
from ldm.pipeline.settings import ALIASES, BATCH, GUIDANCE, GUIDANCE_OPTIONS, GUIDANCE_WORDS, SAMPLER, STEPS

FROM_CALL = ("seed", "num_inference_steps", "guidance_scale", "height", "width", "sampler", "spacing")
FROM_CALL += ("eta", "num_images", "batch_size", *GUIDANCE_WORDS)
FROM_PIPELINE = ("model", "negative_prompt", "vae", "lora", "lora_dir", "allow_unapplied", "device", "dtype")
FROM_PIPELINE += ("offload", "attention", "prediction_type")


class HelpSamplers(argparse.Action):
    """Prints the table and ends, like --help."""

    def __call__(self, parser, *_):
        from ldm.diffusion.names import help_text

        print(help_text())
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what to draw")
    add("-o", "--output", metavar="PATH", help="a file (.png .jpg .webp) or a folder; default: named by the prompt")
    add("-n", *_options("num_images"), type=int, default=1, metavar="N", help="pictures to draw (1)")
    add("--seed", type=int, metavar="N", help="of the first picture; -1 or nothing: drawn, and kept in the file")
    add(
        "--steps",
        *_options("num_inference_steps"),
        dest="num_inference_steps",
        type=int,
        metavar="N",
        help=f"(the model's, or {STEPS})",
    )
    add(
        *_options("guidance_scale"), type=float, metavar="X", help=f"1: without guidance (the model's, or {GUIDANCE:g})"
    )
    add("--guidance", metavar="NAME", default="cfg", help="cfg, apg, pag or cfg_zero (cfg)")
    add("--guidance-rescale", type=float, metavar="X", help="0 to 1: against too much contrast at high scales (0)")
    interval = {"type": float, "nargs": 2, "metavar": ("FROM", "TO")}
    add("--guidance-interval", **interval, help="guide only in this part of the steps, 0 to 1")
    add("--guidance-sigma-interval", **interval, help="or only between these sigmas")
    for name in GUIDANCE_OPTIONS:
        add(f"--{name.replace('_', '-')}", type=OPTION_TYPES.get(name, float), metavar="X", help="of that guidance")
    add(*_options("negative_prompt"), metavar="TEXT", default="", help="what to keep away from")
    add(*_options("sampler"), metavar="NAME", help=f"see --help-samplers (the model's, or {SAMPLER})")
    add(*_options("spacing"), metavar="NAME", help="trailing, karras, …: see --help-samplers (the model's)")
    add("--eta", type=float, metavar="X", help="0 to 1: the noise of samplers that add as much as they are told to")
    add("--help-samplers", action=HelpSamplers, nargs=0, help="list samplers and spacings with all their names")
    add("--width", metavar="PIXELS", type=int, help="(the model's)")
    add("--height", metavar="PIXELS", type=int, help="(the model's)")
    add("--batch-size", metavar="N", type=int, help=f"pictures drawn together ({BATCH}); changes no picture")
    model = "a diffusers folder, a .safetensors file or a hub id (the shipped model)"
    add("--model", metavar="MODEL", default="default", help=model)
    add("--vae", metavar="PATH", help="another VAE's folder or file")
    add("--prediction-type", metavar="NAME", help="epsilon, v_prediction, sample (what the model says)")
    add("--device", metavar="NAME", default="auto", help="auto, cpu, cuda, mps")
    add("--dtype", metavar="NAME", default="auto", help="auto, fp32, bf16, fp16")
    add("--offload", action="store_true", help="keep parts in main memory, on the GPU only while they work")
    add("--attention", metavar="NAME", default="auto", help="of the U-Net: auto, sdpa, chunked, xformers")
    add("--format", metavar="NAME", help="png, jpg, webp (by the name of the file, or png)")
    add("--no-metadata", action="store_true", help="write nothing about prompt and settings into the files")
    add(
        "--lora",
        metavar="FILE[:WEIGHT]",
        action="append",
        type=_lora,
        help="a LoRA or DoRA; may be given several times",
    )
    add("--lora-dir", metavar="FOLDER", help="where <lora:name:0.8> in the prompt finds name.safetensors")
    add("--allow-unapplied", action="store_true", help="warn of a LoRA's keys that fit nowhere, instead of refusing it")
    add("--from", dest="source", metavar="PICTURE", help="draw it again, as its file says; options given here win")
    changes = "with --from: another value, in the words of prompt lines; may be given several times"
    add("--set", dest="changes", metavar="KEY=VALUE", action="append", default=[], help=changes)
    words = ", ".join(f"{word} = {name}" for word, name in ALIASES.items())
    notes = textwrap.fill(f"In Python, other tools' words are taken too: {words}.", 118)
    parser.epilog = f"{parser.epilog}\n\n{notes}"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


OPTION_TYPES = {"pag_layers": _names, "zero_init_steps": int}


def _lora(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; a colon in the name is no weight unless a number follows."""
    path, _, weight = text.rpartition(":")
    try:
        return (path, float(weight)) if path else (text, 1.0)
    except ValueError:
        return text, 1.0


def _options(name: str) -> list[str]:
    """--name, then every word that ALIASES takes for it (those of one letter are left to prompt files)."""
    words = [name, *(word for word, own in ALIASES.items() if own == name and len(word) > 1 and word != "generator")]
    return [f"--{word.replace('_', '-')}" for word in dict.fromkeys(words) if word != "steps"]


def run(args: argparse.Namespace) -> int:
    own, call, told = _asked(args)
    target = Target.of(args.output, args.format).check()
    pipe = Pipeline(**own)
    try:
        images = pipe.generate(**call)
    except (LdmError, KeyboardInterrupt) as stop:
        with contextlib.suppress(LdmError):  # what stopped the work is what is told
            _write(getattr(stop, "images", Images([], [])), target, args)
        raise
    _write(images, target, args)
    _say_differences(told, images.metadata[0])
    record, seeds = images.metadata[0], ", ".join(map(str, images.seeds[:8]))
    steps = f"{record['num_inference_steps']} steps of {record['sampler']}"
    console.say(f"{steps}, {record['device']} in {record['dtype']}, seeds {seeds}", verbosity=1)
    return 0


def _asked(args: argparse.Namespace) -> tuple[dict, dict, Mapping]:
    """(keywords of Pipeline, of generate, what a picture given by --from says of its model and machine)."""
    names = ("prompt", *FROM_PIPELINE), FROM_CALL
    own, call = ({name: getattr(args, name) for name in part} for part in names)
    if args.source is None:
        if args.prompt is None or args.changes:
            what = "--set belongs to --from" if args.changes else "there is no prompt"
            raise ConfigError(what, todo='write ldm generate "a cat", or --from PICTURE')
        return own, call, {}
    from ldm.cli import parse
    from ldm.render.replay import keywords, read_replays

    replays = list(itertools.islice(read_replays([args.source], args.changes), 2))
    if len(replays) > 1:
        raise ConfigError("holds several pictures", where=args.source, todo="draw them with ldm render --from")
    said = keywords(replays[0])
    for note in replays[0].notes:
        console.warn(note)
    plain = vars(parse(["generate"]))  # an option that is not at its default was given
    given = ({name: value for name, value in part.items() if value != plain[name]} for part in (own, call))
    (own, call) = ({**part, **told, **more} for part, told, more in zip((own, call), said, given))
    return own, call, replays[0].told


def _say_differences(told: Mapping, record: Mapping) -> None:
    if told:
        from ldm.render.replay import differences

        for line in differences(told, record):
            console.warn(line)


def _write(images: Images, target: Target, args: argparse.Namespace) -> None:
    for path in images.save_each(target, metadata=not args.no_metadata):
        if not args.quiet:
            print(path, flush=True)
