"""Fine-tune a model on captioned pictures: LoRA, DoRA, or all of it.

examples:
  ldm finetune pictures/ -o runs/mine
  ldm finetune pictures/ -o runs/mine --lora-rank 8 --steps 2000 --learning-rate 5e-4
  ldm finetune pictures/ -o runs/mine --model stable-diffusion-xl-base-1.0/ --dry-run
  ldm finetune pictures/ -o runs/mine --train full --epochs 20
  ldm finetune pictures/ -o runs/mine --resume
  ldm finetune --config runs/mine/settings.json -o runs/again seed=1
  ldm generate "my thing on the beach" --lora runs/mine

What is not said is chosen from the model, the number of pictures and the hardware, and printed as the command that
repeats it. Ctrl-C saves the state and stops; --resume goes on exactly there. A LoRA is written twice, as
RUN/pytorch_lora_weights.safetensors (diffusers) and RUN/<name>.safetensors (A1111, ComfyUI); a model is RUN/model.

The training flags of diffusers' and kohya's scripts are taken too, as are KEY=VALUE for every setting:
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ldm import console
from ldm.errors import ConfigError
from ldm.training.finetuning.options import (
    ALIASES,
    ALONE,
    IDLE,
    KEYS,
    MANY,
    OPTIONS,
    REFUSED,
    SWITCHES,
    read_value,
    table,
)

__doc__ += "\n" + table()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ldm finetune DATA -o RUN [options] [KEY=VALUE ...]"
    add = parser.add_argument
    add("data", metavar="DATA", nargs="?", help="a folder of pictures, a .tar, a .parquet, owner/name on the hub")
    add("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="any setting")
    add("-o", "--output", metavar="RUN", action=Once, help="the run's folder")
    add("--output_dir", "--output-dir", dest="output", action=Once, help=argparse.SUPPRESS)
    add("--config", metavar="FILE", help="settings (.yaml .toml .json); what is said besides goes before them")
    resume = {"nargs": "?", "const": "latest", "action": Once}
    add("--resume", metavar="CHECKPOINT", **resume, help="go on from the latest, best or this one")
    add("--resume_from_checkpoint", "--resume-from-checkpoint", dest="resume", **resume, help=argparse.SUPPRESS)
    add("--allow-changed", metavar="NAME", action="append", default=[], help="a setting that may differ on --resume")
    add("--dry-run", action="store_true", help="check everything, print counts, settings and estimate, train nothing")
    taken: set[str] = set()
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(f"{title} (in brackets what is taken where nothing is said)")
        for word, (value, text) in options.items():
            _add(group, word, value, text)
            taken.add(word)
    for word in dict.fromkeys([*KEYS, *ALIASES, *REFUSED, *IDLE]):
        if word not in taken:
            alone = word in ALONE or (word in ALIASES and ALIASES[word].word in SWITCHES)
            _add(parser, word, None if alone else "X", argparse.SUPPRESS, **({"nargs": "*"} if word in MANY else {}))
    switches = [action for action in parser._actions if action.nargs == "?" and action.const is True]
    parser.switches = frozenset(option for action in switches for option in action.option_strings)


class Once(argparse.Action):
    """Refuses another value than the one that was given before."""

    def __call__(self, parser, namespace, value, option=None):
        before = getattr(namespace, self.dest)
        if before is not None and before != value:
            raise ConfigError(f"{option} {value}: {before} was given before", todo="say one of them")
        setattr(namespace, self.dest, value)


def _add(parser: Any, word: str, value: str | None, text: str, **more: Any) -> None:
    """An option under our spelling; --with_underscores is taken too, and shown nowhere."""
    several = word in ("validation_prompts", "validation_prompt")
    kind = {"nargs": "?", "const": True, "metavar": "false"} if value is None else {"metavar": value, **more}
    shared = {"dest": f"word_{word}", "default": argparse.SUPPRESS, **kind}
    parser.add_argument(f"--{word.replace('_', '-')}", help=text, **shared, **({"action": "append"} if several else {}))
    if "_" in word:  # diffusers' --validation_prompts takes several at once
        several_at_once = {"action": "extend", "nargs": "+"} if several else {}
        parser.add_argument(f"--{word}", help=argparse.SUPPRESS, **shared, **several_at_once)


def run(args: argparse.Namespace) -> int:
    from ldm.training import finetune

    data, overrides, resume = args.data, list(args.overrides), args.resume
    if data is not None and "=" in data and not os.path.exists(data):  # no DATA: a KEY=VALUE stands in its place
        data, overrides = None, [data, *overrides]
    if resume is not None and "=" in resume:  # `--resume steps=9`: the value belongs to the settings
        overrides, resume = [*overrides, resume], "latest"
    options = {"config": args.config, "resume": resume, "allow_changed": args.allow_changed, "dry_run": args.dry_run}
    done = finetune(data, args.output, overrides=overrides, **options, **given_words(args))
    if console.level >= 0 and not args.dry_run:
        print(done)
    return 0


def given_words(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options, by the words that were said."""
    found = {name.removeprefix("word_"): value for name, value in vars(args).items() if name.startswith("word_")}
    return {word: read_value(word, value) if isinstance(value, str) else value for word, value in found.items()}
