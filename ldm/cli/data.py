"""Make and check datasets.

examples:
  ldm data emoji -o scenes/ -n 2000 --seed 1       draws captioned emoji scenes as an imagefolder
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ldm.cli import common_options

    kinds = parser.add_subparsers(dest="kind", metavar="WHAT", required=True)
    emoji = kinds.add_parser("emoji", help="draw captioned emoji scenes", parents=[common_options()])
    emoji.add_argument("-o", "--output", metavar="DIR", required=True, help="the folder to write")
    emoji.add_argument("-n", "--num-images", metavar="N", type=int, default=1000, help="scenes to draw (1000)")
    emoji.add_argument("--seed", metavar="N", type=int, default=0, help="scene i is a function of (seed, i) alone (0)")
    emoji.add_argument("--font", metavar="FILE", help="NotoColorEmoji.ttf, where it is not installed")


def run(args: argparse.Namespace) -> int:
    from ldm.data import emoji

    folder = emoji.export(args.output, args.num_images, seed=args.seed, font=args.font)
    if not args.quiet:
        print(folder)
    return 0
