"""Distil a model: do without guidance, or in few steps, what it does now.

examples:
  ldm distill -o runs/fast --config emoji/fast             (the shipped model in 4 steps, without guidance)
  ldm distill -o runs/guided --config emoji/guided         (the shipped model without guidance: half the work)
  ldm distill stable-diffusion-v1-5/ -o runs/four data=images/ steps=4000
  ldm distill stable-diffusion-v1-5/ -o runs/four prompts=captions.txt drawn=2000   (the model draws its own data)
  ldm distill stable-diffusion-v1-5/ -o runs/guided method=guidance train=full guidance_range=[1,12] data=images/
  ldm distill -o runs/fast --resume
  ldm generate "a cat" --lora runs/fast

method=consistency (the usual one) makes a student that draws in segments=4 steps and learns on images,
method=trajectory one that learns from how the model itself draws captions, method=guidance one that does without
guidance. A LoRA is written as RUN/pytorch_lora_weights.safetensors and RUN/<name>.safetensors, a model as RUN/model;
both carry the settings to draw with, and the other commands take these. Ctrl-C saves the state and stops; --resume
continues exactly there.
"""

from __future__ import annotations

import argparse

from ldm import console
from ldm.cli.overrides import sorted_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "ldm distill [MODEL] -o RUN [options] [KEY=VALUE ...]"
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="what is distilled (the shipped model)")
    add("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings")
    add("-o", "--output", metavar="RUN", required=True, help="the run's folder")
    add("--config", metavar="CONFIG", help="a packaged name (emoji/fast) or a file (.yaml .toml .json)")
    add("--resume", metavar="CHECKPOINT", nargs="?", const="latest", help="go on from the latest, best or this one")
    add("--allow-changed", metavar="NAME", action="append", default=[], help="a setting that may differ on --resume")
    add("--dry-run", action="store_true", help="check everything, print the settings, train nothing")


def run(args: argparse.Namespace) -> int:
    from ldm.training import distill

    model, overrides, resume = sorted_out(args.model, args.overrides, args.resume)
    options = {"config": args.config, "resume": resume, "allow_changed": args.allow_changed, "dry_run": args.dry_run}
    made = distill(model, args.output, overrides=overrides, **options)
    if console.level >= 0 and not args.dry_run:
        print(made)
    return 0
