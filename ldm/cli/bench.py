"""Time ldm against diffusers, after checking that their images agree; or compare all samplers.

examples:
  ldm bench                                        cold and warm
  ldm bench cold --repeats 5                       from a new process to an image, against bare imports
  ldm bench warm --sampler unipc --steps 25        an image with the models in memory, against diffusers
  ldm bench warm --dtype bf16 --profile            the same, and which operators take the time
  ldm bench warm --json > warm.json
  ldm bench render --images 32 --batch-size 8      a prompt file to PNGs, against loops over diffusers' pipeline
  ldm bench training --config small/256            a step of ldm train, against a loop over diffusers' U-Net
  ldm bench samplers -o docs/samplers              every sampler at 4, 8, 16, 32 steps: images, distances, a plot
  ldm bench samplers --steps 10,20 --sampler euler,dpmpp_2m --prompts 2
  ldm bench shortcuts --prompts 4                  --step-cache and guidance presets: time and distance from exact

Timings: a ratio below 1 means that ldm is faster; nothing else should run on the machine meanwhile. Samplers: the
distance of their images from those of 1,000 steps, and the sampler that comes nearest with the same work. This takes
minutes, and the load of the machine does not matter.
"""

from __future__ import annotations

import argparse

from ldm.errors import ConfigError

SETTINGS = ("repeats", "model", "steps", "sampler", "guidance_scale", "dtype", "device", "profile", "prompts", "out")
SETTINGS += ("images", "batch_size", "config", "vae", "text", "compile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", metavar="BENCH", nargs="*", help="cold, warm, render, training, samplers, shortcuts (the first two)")
    add("--repeats", type=int, metavar="N", help="timed rounds, of which the median counts (5; render: 3)")
    add("--model", metavar="MODEL", help="a folder (the shipped model)")
    add("--steps", type=_steps, metavar="N", help="warm, render, shortcuts: one number (25); samplers: 4,8,16,32")
    add("--sampler", metavar="NAME", help="dpmpp_2m, unipc, ddim, euler (dpmpp_2m); samplers: names with commas (all)")
    add("--guidance-scale", type=float, metavar="X", help="warm, render (4)")
    add("--dtype", metavar="NAME", help="auto, fp32, bf16, fp16 (fp32; training: auto)")
    add("--device", metavar="NAME", help="cpu, cuda (cpu)")
    add("--profile", action="store_true", default=None, help="warm, training: print the operators that take longest")
    add("--prompts", type=int, metavar="N", help="samplers, shortcuts: images to average the distances over (8, 4)")
    add("--images", "--pictures", type=int, metavar="N", help="render: lines of the file (16)")
    add("--batch-size", type=int, metavar="N", help="render, training: images drawn or trained together (8)")
    add("--config", metavar="NAME", help="training: settings of a U-Net (small/256)")
    for name, part in (("vae", "autoencoder"), ("text", "text encoder")):
        add(f"--{name}", metavar=name.upper(), help=f"training: the {part} whose sizes the U-Net gets (default)")
    add("--compile", action="store_true", default=None, help="training: compile our U-Net")
    out = "samplers: write samplers.png, samplers.svg and samplers.json (nothing)"
    add("-o", "--output", dest="out", metavar="FOLDER", help=out)
    add("--json", action="store_true", help="print one JSON document instead of the table")


def run(args: argparse.Namespace) -> int:
    import json

    from ldm.bench import bench

    settings = {name: value for name in SETTINGS if (value := getattr(args, name)) is not None}
    results = bench(args.names, **settings)
    if args.json:
        print(json.dumps([result.as_json() for result in results], indent=1))
    else:
        print("\n".join(result.text() for result in results))
    return 0


def _steps(text: str) -> int | list[int]:
    """25 -> 25, 4,8 -> [4, 8]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"expected whole numbers with commas, got {text!r:.80}", where="--steps") from None
    return numbers if len(numbers) > 1 else numbers[0]
