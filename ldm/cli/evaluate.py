"""Measure what a model draws: objects and grounds named by a judge that has no network of ours in it.

examples:
  ldm evaluate                                     the shipped model
  ldm evaluate runs/unet/model
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", default="default", help="a model folder (the shipped one)")


def run(args: argparse.Namespace) -> int:
    from ldm.evaluation import evaluate

    evaluate(args.model)
    return 0
