"""Timings for a GPU, as JSON: `python tests/gpu/timings.py OUT [--device cpu --tiny]`. Each line is one measurement.

Training of the emoji recipe's U-Net at several batch sizes, and calls of U-Nets of SD 1.5's and XL's shape, ours and
diffusers', side by side. What does not fit into memory is said, and the rest goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from ldm.bench.networks import SD15, XL, unet_diffusers, unet_ldm
from ldm.config import build
from ldm.device import is_out_of_memory, let_go
from ldm.nn.unet import UNetConfig
from ldm.training.forecast import Trial
from ldm.training.loop.step import prepare, take_step
from ldm.training.settings import UNetSettings

EMOJI = Path(__file__).parents[2] / "configs" / "emoji" / "unet.yaml"
TINY = {"block_out_channels": (32, 64), "transformer_layers": (1, 0), "num_heads": (4, 4), "norm_num_groups": 8}
TINY |= {"cross_attention_dim": 32, "sample_size": 8, "layers_per_block": 1}


def timed(work: Callable[[], Any], count: int, device: torch.device) -> float:
    """Seconds of a call: the mean of `count` after three that warm up."""
    for _ in range(min(3, count)):
        work()
    wait(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    wait(device)
    return (time.perf_counter() - began) / count


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device, size: int) -> dict[str, float]:
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    return {"TFLOP/s": 2e-12 * size**3 / timed(lambda: a @ a, 10, device)}


def training(device: torch.device, batch: int, steps: int, tiny: bool) -> dict[str, float]:
    """Steps of the emoji recipe on latents and texts that are in memory already."""
    asked = yaml.safe_load(EMOJI.read_text())
    kept = ("optimizer", "learning_rate", "ema", "schedule")
    settings = UNetSettings(
        **{name: asked[name] for name in kept},
        stage="unet",
        vae="default",
        text="default",
        steps=steps,
        batch_size=batch,
        device=device.type,
    )
    shape = TINY if tiny else {**asked["model"], "cross_attention_dim": 192, "sample_size": 16}
    shape |= {} if tiny else {"in_channels": 8, "out_channels": 8}
    config = build(UNetConfig, {name: tuple(v) if isinstance(v, list) else v for name, v in shape.items()}, "model")
    trial = Trial(settings, config, batch, device)
    state = prepare(trial, settings, device)
    batches = itertools.repeat(next(trial.batches(0)))
    seconds = timed(lambda: take_step(trial, state, settings, batches), steps, device)
    found = {"seconds of a step": seconds, "samples/s": batch / seconds}
    if device.type == "cuda":
        found["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def network(device: torch.device, shape: dict[str, Any], ours: bool, count: int) -> dict[str, float]:
    """Evaluations with guidance (two rows) of one image."""
    config, dtype = UNetConfig(**shape), "bf16" if device.type == "cuda" else "fp32"
    name = str(device)
    work = unet_ldm(config, dtype, name) if ours else unet_diffusers(config, dtype, name, compiled=False)
    return {"it/s": 1 / timed(work.call, count, device)}


def plan(tiny: bool) -> dict[str, Callable[[torch.device], dict[str, float]]]:
    found: dict[str, Any] = {"bf16 matrix product": lambda device: matrix_rate(device, 256 if tiny else 8192)}
    shapes = {"tiny": TINY} if tiny else {"SD 1.5 512x512": SD15, "XL 1024x1024": XL}
    for (name, shape), ours in itertools.product(shapes.items(), (True, False)):
        who, count = "ours" if ours else "diffusers, eager", 2 if tiny else 30
        found[f"{name}, {who}"] = lambda device, s=shape, o=ours, n=count: network(device, s, o, n)
    for batch in (2, 4) if tiny else (32, 256, 1024):
        found[f"training, batch {batch}"] = lambda device, b=batch: training(device, b, 2 if tiny else 30, tiny)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="networks of a few thousand numbers, to try this out")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as lines:
        for name, measure in plan(args.tiny).items():
            try:
                row = measure(device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                row = {"failed": "out of memory"}
            let_go()
            print(json.dumps({"what": name, **row}), flush=True)
            lines.write(json.dumps({"what": name, "device": name_of(device), **row}) + "\n")
            lines.flush()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
