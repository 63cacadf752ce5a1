"""Train one stage of a model, autoencoder, text or unet, or a ControlNet for one on drawn scenes.

examples:
  ldm train emoji/autoencoder -o runs/vae
  ldm train emoji/text -o runs/text vae=runs/vae
  ldm train emoji/unet -o runs/unet vae=runs/vae text=runs/text
  ldm train emoji/unet -o runs/mine data=my-pictures/ steps=20000 learning_rate=5e-4
  ldm train emoji/unet -o runs/unet vae=runs/vae text=runs/text --resume
  ldm train tiny/128 -o runs/tiny data=images/ vae=default text=models/clip --dry-run   (parameters, memory, time)
  ldm train sd/256 -o runs/sd data=images/ vae=stabilityai/sd-vae-ft-mse text=openai/clip-vit-large-patch14
  ldm train emoji/small -o runs/small vae=weights/default text=weights/default snr_gamma=5   (two minutes, to compare)
  ldm train emoji/edges -o runs/edges                                                   (a ControlNet, docs/control.md)

The finished model is RUN/model, a diffusers folder. Ctrl-C saves the state and stops; --resume goes on exactly there.
"""

from __future__ import annotations

import argparse

from ldm import console
from ldm.cli.overrides import sorted_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("config", metavar="CONFIG", help="a packaged name (emoji/unet) or a file (.yaml .toml .json)")
    add("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings in place of the config's")
    add("-o", "--output", metavar="RUN", required=True, help="the run's folder")
    add("--resume", metavar="CHECKPOINT", nargs="?", const="latest", help="go on from the latest, best or this one")
    add("--allow-changed", metavar="NAME", action="append", default=[], help="a setting that may differ on --resume")
    add("--dry-run", action="store_true", help="check everything, print the settings, train nothing")


def run(args: argparse.Namespace) -> int:
    from ldm.training import train

    _, overrides, resume = sorted_out(None, args.overrides, args.resume)
    options = {"resume": resume, "allow_changed": args.allow_changed, "dry_run": args.dry_run}
    model = train(args.config, args.output, overrides, **options)
    if console.level >= 0 and not args.dry_run:
        print(model)
    return 0
