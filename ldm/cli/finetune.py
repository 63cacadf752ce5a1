"""Fine-tune a model on captioned images: LoRA, DoRA, or all of it.

examples:
  ldm finetune images/ -o runs/mine
  ldm finetune images/ -o runs/mine --lora-rank 8 --steps 2000 --learning-rate 5e-4
  ldm finetune images/ -o runs/mine --model stable-diffusion-xl-base-1.0/ --dry-run
  ldm finetune images/ -o runs/mine --train full --epochs 20
  ldm finetune images/ -o runs/edges --control edges
  ldm finetune images/ -o runs/mine --resume
  ldm finetune --config runs/mine/settings.json -o runs/again seed=1
  ldm generate "my thing on the beach" --lora runs/mine

Settings that are not given are chosen from the model, the number of images and the hardware, and printed as the
command that repeats the run. Ctrl-C saves the state and stops; --resume continues exactly there. A LoRA is written
twice, as RUN/pytorch_lora_weights.safetensors (diffusers) and RUN/<name>.safetensors (A1111, ComfyUI); a model is
RUN/model.

KEY=VALUE gives any setting. The options of diffusers' and kohya's training scripts are accepted for ours:
"""

from __future__ import annotations

import argparse
from typing import Any

from ldm import console
from ldm.cli.overrides import sorted_out
from ldm.errors import ConfigError
from ldm.training.finetuning.options import (
    ALIASES,
    FOREIGN_SWITCHES,
    IDLE,
    KEYS,
    MANY,
    OPTIONS,
    REFUSED,
    SWITCHES,
    alias_table,
    parse_value,
)

__doc__ += "\n" + alias_table()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ldm finetune DATA -o RUN [options] [KEY=VALUE ...]"
    add = parser.add_argument
    add("data", metavar="DATA", nargs="?", help="a folder of images, a .tar, a .parquet, owner/name on the hub")
    add("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="any setting")
    add("-o", "--output", metavar="RUN", action=Once, help="the run's folder")
    add("--output_dir", "--output-dir", dest="output", action=Once, help=argparse.SUPPRESS)
    add("--config", metavar="FILE", help="settings (.yaml .toml .json); options override them")
    resume = {"nargs": "?", "const": "latest", "action": Once}
    add("--resume", metavar="CHECKPOINT", **resume, help="continue from the latest, best or this one")
    add("--resume_from_checkpoint", "--resume-from-checkpoint", dest="resume", **resume, help=argparse.SUPPRESS)
    add("--allow-changed", metavar="NAME", action="append", default=[], help="a setting that may differ on --resume")
    add("--dry-run", action="store_true", help="check everything, print counts, settings and estimate, train nothing")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(
            f"{title} (in brackets: the default, unless a preset for the model says otherwise)"
        )
        for name, (value, text) in options.items():
            _add(group, name, value, text)
    shown = {name for options in OPTIONS.values() for name in options}
    for name in dict.fromkeys([*KEYS, *ALIASES, *REFUSED, *IDLE]):
        if name not in shown:
            switch = name in FOREIGN_SWITCHES or (name in ALIASES and ALIASES[name].name in SWITCHES)
            _add(parser, name, None if switch else "X", argparse.SUPPRESS, **({"nargs": "*"} if name in MANY else {}))
    switches = [action for action in parser._actions if action.nargs == "?" and action.const is True]
    parser.switches = frozenset(option for action in switches for option in action.option_strings)


class Once(argparse.Action):
    """Refuses a second, other value."""

    def __call__(self, parser, namespace, value, option=None):
        before = getattr(namespace, self.dest)
        if before is not None and before != value:
            raise ConfigError(f"{option} {value}: {before} was given before", hint="give one of them")
        setattr(namespace, self.dest, value)


def _add(parser: Any, name: str, value: str | None, text: str, **more: Any) -> None:
    """An option with dashes, and the same with underscores, which --help does not show."""
    several = name in ("validation_prompts", "validation_prompt", "exclude", "text_encoders")
    kind = {"nargs": "?", "const": True, "metavar": "false"} if value is None else {"metavar": value, **more}
    shared = {"dest": f"option_{name}", "default": argparse.SUPPRESS, **kind}
    parser.add_argument(f"--{name.replace('_', '-')}", help=text, **shared, **({"action": "append"} if several else {}))
    if "_" in name:  # diffusers' --validation_prompts takes several at once
        several_at_once = {"action": "extend", "nargs": "+"} if several else {}
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS, **shared, **several_at_once)


def run(args: argparse.Namespace) -> int:
    from ldm.training import finetune

    data, overrides, resume = sorted_out(args.data, args.overrides, args.resume)
    options = {"config": args.config, "resume": resume, "allow_changed": args.allow_changed, "dry_run": args.dry_run}
    done = finetune(data, args.output, overrides=overrides, **options, **given_options(args))
    if console.level >= 0 and not args.dry_run:
        print(done)
    return 0


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that are given as options, by the names of these."""
    texts = {name.removeprefix("option_"): text for name, text in vars(args).items() if name.startswith("option_")}
    return {name: parse_value(name, text) if isinstance(text, str) else text for name, text in texts.items()}
