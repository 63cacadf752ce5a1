"""Measure speed beside diffusers, in alternation, after checking that the pictures agree; or compare the samplers.

examples:
  ldm bench                                        cold and warm
  ldm bench cold --repeats 5                       from a new process to a picture, against bare imports
  ldm bench warm --sampler unipc --steps 25        a picture from models in memory, against diffusers
  ldm bench warm --dtype bf16 --profile            and where the time goes
  ldm bench warm --json > warm.json
  ldm bench render --pictures 32 --batch-size 8    a prompt file to PNGs, against loops over diffusers' pipeline
  ldm bench samplers -o docs/samplers              every sampler at 4, 8, 16, 32 steps: pictures, distances, a plot
  ldm bench samplers --steps 10,20 --sampler euler,dpmpp_2m --prompts 2

Times: a ratio below 1 means that we are faster; nothing else should run on the machine meanwhile. Samplers: how far
pictures are from those of 1,000 steps, and which sampler comes nearest with the same work; minutes, and the machine's
load does not matter.
"""

from __future__ import annotations

import argparse

from ldm.errors import ConfigError

SETTINGS = ("repeats", "model", "steps", "sampler", "guidance_scale", "dtype", "device", "profile", "prompts", "out")
SETTINGS += ("pictures", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", metavar="BENCH", nargs="*", help="cold, warm, render, samplers (the first two)")
    add("--repeats", type=int, metavar="N", help="timed rounds; the median is told (5; render: 3)")
    add("--model", metavar="MODEL", help="a folder (the shipped model)")
    add("--steps", type=_steps, metavar="N", help="warm, render: one number (25); samplers: 4,8,16,32")
    add("--sampler", metavar="NAME", help="dpmpp_2m, unipc, ddim, euler (dpmpp_2m); samplers: names with commas (all)")
    add("--guidance-scale", type=float, metavar="X", help="warm, render (4)")
    add("--dtype", metavar="NAME", help="auto, fp32, bf16, fp16 (fp32)")
    add("--device", metavar="NAME", help="cpu, cuda (cpu)")
    add("--profile", action="store_true", default=None, help="warm: print the operators that take longest")
    add("--prompts", type=int, metavar="N", help="samplers: pictures that distances are the means of (8)")
    add("--pictures", type=int, metavar="N", help="render: lines of the file (16)")
    add("--batch-size", type=int, metavar="N", help="render: pictures drawn together, ours and theirs (8)")
    out = "samplers: write samplers.png, samplers.svg and samplers.json (nothing)"
    add("-o", "--output", dest="out", metavar="FOLDER", help=out)
    add("--json", action="store_true", help="print one JSON document in place of the table")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.bench import bench

    given = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    found = bench(args.names, **given)
    if args.json:
        print(json.dumps([one.record() for one in found], indent=1))
    else:
        print("\n".join(one.text() for one in found))
    return 0


def _steps(text: str) -> int | list[int]:
    """25 -> 25, 4,8 -> [4, 8]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"expected whole numbers with commas, got {text!r:.80}", where="--steps") from None
    return numbers if len(numbers) > 1 else numbers[0]
