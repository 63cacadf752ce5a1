"""What training a network from nothing will take: parameters, FLOPs, memory, images a second, time and disk.

Steps are tried on random latents and texts where they fit into memory and into a minute; else their time is estimated
from the FLOPs and the speed of a matrix product here, and the lines say so.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.checkpoint.safety import ITEM_BYTES, read_header
from ldm.config import build
from ldm.device import free_memory, is_out_of_memory, pick_device
from ldm.diffusion.denoiser import training_loss
from ldm.diffusion.schedule import Schedule
from ldm.files import format_bytes
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.unet_config import UNetConfig
from ldm.training.distributed import RowShard
from ldm.training.loop.estimate import estimate
from ldm.training.loop.optimizers import checkpoint_bytes
from ldm.training.loop.step import precision
from ldm.training.parts import network_config, new_network, text_parts, vae_part
from ldm.training.settings import UNetSettings
from ldm.training.stages.common import timesteps_at

SECONDS = 60.0  # that two tried steps may take
SHARE = 0.6  # of the free memory that a tried step may take: others use the machine too
TOKENS = 77  # of a caption, for CLIP


Config = UNetConfig | MMDiTConfig


class TrialBatch(NamedTuple):
    """Random rows."""

    latents: Tensor  # (B, C, h, w)
    inputs: dict[str, Tensor]  # keywords of the network
    part: RowShard


class Trial:
    """The network of the settings on random rows: as the stage, without its parts and its data."""

    def __init__(self, settings: UNetSettings, config: Config, count: int, device: torch.device, tokens: int = TOKENS):
        self.schedule = build(Schedule, settings.schedule, "schedule")
        self.config, self.count, self.device, self.tokens = config, count, device, tokens
        with torch.random.fork_rng(devices=[]):
            self.module = new_network(config)

    def batches(self, first_step: int) -> Iterator[TrialBatch]:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(self.device)

        while True:
            c, side = self.config, self.config.sample_size or 0
            inputs = inputs_of(c, normal, self.count, self.tokens)
            yield TrialBatch(normal(self.count, c.in_channels, side, side), inputs, RowShard(self.count))

    def loss(self, batch: TrialBatch, step: int, micro: int) -> Tensor:
        x0 = batch.latents
        u = (torch.arange(len(x0)) + 0.5) / len(x0)
        inputs = {name: value for name, value in batch.inputs.items() if name != "states"}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            return self.module(x, t, batch.inputs["states"], **inputs)

        times = timesteps_at(self.schedule, u).to(self.device)
        return training_loss(predict, self.schedule, x0, torch.randn_like(x0), times).mean()

    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        return {}

    def sample_grid(self, ema: nn.Module) -> None:
        return None

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        return folder


def inputs_of(config: Config, normal: Callable[..., Tensor], count: int, tokens: int) -> dict[str, Tensor]:
    """Random texts, for XL and transformers pooled ones, for XL sizes, as keywords of the network."""
    inputs = {"states": normal(count, tokens, config.text_width)}
    if config.pooled_width is not None:
        inputs["pooled"] = normal(count, config.pooled_width)
    return inputs | ({"time_ids": normal(count, 6)} if config.takes_sizes else {})


def costs(config: Config, checkpointing: bool, tokens: int = TOKENS) -> tuple[int, int, int]:
    """(parameters, FLOPs of a training step, bytes that its backward pass keeps) of one image, on no device.

    FLOPs are those of convolutions, matrix products and attention: forward once (twice with gradient checkpointing),
    and twice that for the backward pass; not those of the optimizer. `tokens` is the length of a text. Bytes are fp32
    and without gradient checkpointing.
    """
    with torch.device("meta"):
        unet, side = new_network(config), config.sample_size or 0

        def normal(*shape: int) -> Tensor:
            return torch.empty(shape)

        inputs = inputs_of(config, normal, 1, tokens)
        x, timesteps, states = normal(1, config.in_channels, side, side), normal(1), inputs.pop("states")
    weights = {parameter.untyped_storage()._cdata for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = unet(x, timesteps, states, **inputs)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    size = sum(kept.values())
    del out
    return parameters, counter.get_total_flops() * (4 if checkpointing else 3), size


def forecast_lines(settings: UNetSettings, steps: int) -> list[str]:
    """The lines of a dry run, for so many remaining steps."""
    vae, text = vae_part(settings), text_parts(settings)
    config = network_config(settings, vae, text)
    device = pick_device(settings.device)
    tokens = text.tokens
    parameters, flops, kept = costs(config, settings.gradient_checkpointing, tokens)
    with torch.device("meta"):
        disk = checkpoint_bytes(settings, new_network(config))
    state = disk + 4 * parameters  # weights, their average, moments; and gradients
    activations = settings.batch_size * kept * (0.2 if settings.gradient_checkpointing else 1)
    parts = sum(_numbers(path) for path in (*vae.files, *text.files)) * 4
    count = settings.batch_size * settings.accumulation
    kind = "transformer" if isinstance(config, MMDiTConfig) else "U-Net"
    lines = [
        f"{kind}: {_short(parameters)} parameters, {flops / 1e12:.3g} TFLOPs to train on one image",
        f"{steps} steps of {count} images ({_short(steps * count)} in all)",
    ]
    room, peak = free_memory(device), state + activations
    rate = _speed(settings, device)
    fits = state + kept < SHARE * room
    most = int((SHARE * room - state) // kept)
    measured = _measured(settings, config, tokens, device, flops / rate, most) if fits else None
    if measured is None:
        why = f"two steps would take over {SECONDS:.0f} s" if fits else "a step does not fit into the free memory"
        each, how = count * flops / rate, f"estimated from {rate / 1e12:.2g} TFLOP/s of a matrix product, {why}"
    else:
        each, how = measured
    lines += [
        f"memory: about {format_bytes(peak)} in fp32 ({format_bytes(room)} are free), and {format_bytes(parts)} for the"
        " autoencoder and the text encoder",
        f"speed: {count / each:.3g} images/s with cached latents and texts ({how})",
        f"time: about {timedelta(seconds=round(each * steps))}; scores, sample grids, checkpoints and encoding on top",
        f"disk: {format_bytes(disk)} a checkpoint, up to {settings.keep + 2} at a time",
    ]
    return lines


def _measured(
    settings: UNetSettings, config: Config, tokens: int, device: torch.device, seconds: float, most: int
) -> tuple[float, str] | None:
    """(seconds of a step, how they were found) from two tried steps; None where they take too long, or do not fit.

    `seconds` is what one image may take, `most` how many fit. Fewer than those of a step are tried where needed.
    """
    count = min(settings.batch_size, math.floor(SECONDS / 2 / seconds), most)
    if count < 1:
        return None
    try:
        trial = Trial(settings, config, count, device, tokens)
        one = dataclasses.replace(settings, accumulation=1, batch_size=count)
        found = estimate(trial, one).step_seconds
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    images = settings.batch_size * settings.accumulation
    what = f"measured: a step of {count} images took {found:.2g} s"
    return found * images / count, f"{what} on {device.type}"


def _speed(settings: UNetSettings, device: torch.device) -> float:
    """FLOP/s of a matrix product in the settings' precision, here and now."""
    size = 4096 if device.type == "cuda" else 768
    a, took = torch.randn(size, size, device=device), []
    with precision(settings, device), torch.no_grad():
        for _ in range(4):
            began = time.perf_counter()
            float((a @ a)[0, 0])
            took.append(time.perf_counter() - began)
    return 2 * size**3 / min(took)


def _numbers(path: Path) -> int:
    """How many numbers a file of weights holds; 0 of other files."""
    if path.suffix != ".safetensors":
        return 0
    return sum(tensor.size // ITEM_BYTES[tensor.dtype] for tensor in read_header(path).tensors.values())


def _short(number: Any) -> str:
    """1234567 -> 1.23 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
