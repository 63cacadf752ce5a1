"""Measure this machine: ldm beside diffusers, results compared first; or compare all samplers.

examples:
  ldm bench --quick                                rows at small sizes, as many as two minutes have room for
  ldm bench --json now.json --html now.html        every row at its own size: an hour on two cores
  ldm bench --quick --against before.json          and what has changed since
  ldm bench unet-sd15 unet-xl vae --dtype fp32     some rows
  ldm bench warm --sampler unipc --steps 25        an image with the models in memory
  ldm bench warm --dtype bf16 --profile            the same, and which operators take the time
  ldm bench render --images 32 --batch-size 8      a prompt file to PNGs, against loops over diffusers' pipeline
  ldm bench training --config small/256            a step of ldm train, against a loop over diffusers' U-Net
  ldm bench samplers -o docs/samplers              every sampler at 4, 8, 16, 32 steps: images, distances, a plot
  ldm bench samplers --steps 10,20 --sampler euler,dpmpp_2m --prompts 2
  ldm bench shortcuts --prompts 4                  --step-cache and guidance presets: time and distance from exact
  ldm bench compute --runs runs/a runs/b -o out/   networks that you trained: scores against FLOPs, a plot

Rows: each side has a process of its own, and they take turns. A ratio below 1 means that ldm is faster; nothing else
should run on the machine meanwhile. Sizes that do not fit into the free memory are left out, and said. Samplers: the
distance of their images from those of 1,000 steps, and the sampler that comes nearest with the same work. This takes
minutes, and the load of the machine does not matter.
"""

from __future__ import annotations

import argparse

from ldm.errors import ConfigError

SETTINGS = ("repeats", "model", "steps", "sampler", "guidance_scale", "dtype", "device", "profile", "prompts", "out")
SETTINGS += ("images", "batch_size", "config", "vae", "text", "compile", "backend", "quick", "runs")
ROWS = "cold, warm, render, unet-sd15, unet-sd21, unet-xl, vae, training, lora-sd15, lora-sd21, lora-xl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", metavar="BENCH", nargs="*", help=f"{ROWS} (all of these); samplers, shortcuts, compute")
    add("--quick", action="store_true", default=None, help="small sizes, one round, nothing compiled, two minutes")
    add("--repeats", type=int, metavar="N", help="timed rounds, of which the median counts (5)")
    add("--model", metavar="MODEL", help="a folder (the shipped model)")
    add("--steps", type=_steps, metavar="N", help="warm, render, shortcuts: one number (25); samplers: 4,8,16,32")
    add("--sampler", metavar="NAME", help="dpmpp_2m, unipc, ddim, euler (dpmpp_2m); samplers: names with commas (all)")
    add("--guidance-scale", type=float, metavar="X", help="warm, render (4)")
    add("--dtype", metavar="NAME", help="auto, fp32, bf16, fp16 (images: fp32; networks, training: the fastest)")
    add("--device", metavar="NAME", help="cpu, cuda (cpu)")
    add("--profile", action="store_true", default=None, help="print the operators that take longest")
    add("--prompts", type=int, metavar="N", help="samplers, shortcuts: images to average the distances over (8, 4)")
    add("--images", "--pictures", type=int, metavar="N", help="render: lines of the file (16)")
    add("--batch-size", type=int, metavar="N", help="render, training: images drawn or trained together (8)")
    add("--config", metavar="NAME", help="training: settings of a U-Net (small/256)")
    for name, part in (("vae", "autoencoder"), ("text", "text encoder")):
        add(f"--{name}", metavar=name.upper(), help=f"training: the {part} whose sizes the U-Net gets (default)")
    runs = "compute: finished runs of `ldm train`, judged by `ldm evaluate RUN/model -o RUN/judged`"
    add("--runs", metavar="RUN", nargs="+", help=runs)
    add("--compile", action="store_true", default=None, help="warm, training: compile our U-Net too")
    add("--backend", metavar="NAME", help="warm: torch or openvino, by which our U-Net is computed (torch)")
    out = "samplers: write samplers.png, samplers.svg and samplers.json; compute: compute.svg, compute.json (nothing)"
    add("-o", "--output", dest="out", metavar="FOLDER", help=out)
    json = "write the machine and all results; without FILE print them instead of the text"
    add("--json", metavar="FILE", nargs="?", const="-", help=json)
    add("--html", metavar="FILE", help="write a page with a table")
    add("--against", metavar="FILE", help="an older --json file that the results are compared with")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.bench import bench, table
    from ldm.bench.machine import facts
    from ldm.bench.table import Result
    from ldm.bench.timing import Timing
    from ldm.files import atomic_write

    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    old = table.read(args.against) if args.against else None
    printed, machine, results = args.json == "-", facts(), []

    def keep(result: Result) -> None:
        """Each result is written as soon as it is there."""
        results.append(result)
        if not printed:
            print(result.text(), flush=True)
        if args.json and not printed:
            atomic_write(args.json, json.dumps(table.as_json(machine, results), indent=1) + "\n")
        if args.html:
            atomic_write(args.html, table.page(machine, results, old))

    if not printed:
        print(table.facts_line(machine), flush=True)
    bench(args.names, show=keep, **settings)
    if printed:
        print(json.dumps(table.as_json(machine, results), indent=1))
    elif old is not None:
        print("\n".join(table.against(old, table.as_json(machine, results))))
    return 3 if any(isinstance(result, Timing) and result.differs for result in results) else 0


def _steps(text: str) -> int | list[int]:
    """25 -> 25, 4,8 -> [4, 8]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"expected whole numbers with commas, got {text!r:.80}", where="--steps") from None
    return numbers if len(numbers) > 1 else numbers[0]
