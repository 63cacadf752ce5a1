"""Measure speed beside diffusers, in alternation, after checking that the pictures agree.

examples:
  ldm bench                                        all of it
  ldm bench cold --repeats 5                       from a new process to a picture, against bare imports
  ldm bench warm --sampler euler --steps 25        a picture from models in memory, against diffusers
  ldm bench warm --dtype bf16 --profile            and where the time goes
  ldm bench warm --json > warm.json

A ratio below 1 means that we are faster. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse

SETTINGS = ("model", "steps", "sampler", "guidance_scale", "dtype", "device", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", metavar="BENCH", nargs="*", help="cold, warm (all)")
    add("--repeats", type=int, metavar="N", default=5, help="timed rounds; the median is told (5)")
    add("--model", metavar="MODEL", help="a folder (the shipped model)")
    add("--steps", type=int, metavar="N", help="(25)")
    add("--sampler", metavar="NAME", help="ddim, euler, dpmpp_2m (ddim)")
    add("--guidance-scale", type=float, metavar="X", help="(4)")
    add("--dtype", metavar="NAME", help="fp32, bf16, fp16 (fp32)")
    add("--device", metavar="NAME", help="cpu, cuda (cpu)")
    add("--profile", action="store_true", default=None, help="print the operators that take longest")
    add("--json", action="store_true", help="print one JSON document in place of the table")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.bench import bench

    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    found = bench(args.names, args.repeats, **given)
    if args.json:
        print(json.dumps([timing.record() for timing in found], indent=1))
    else:
        print("\n".join(timing.text() for timing in found))
    return 0
