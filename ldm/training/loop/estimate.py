"""What a run will take, from two of its steps taken for trial: time, memory and disk."""

from __future__ import annotations

import dataclasses
import itertools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.device import keep_memory, pick_device
from ldm.files import format_bytes
from ldm.training.checkpoints.state import TrainState, trained_names
from ldm.training.loop.optimizers import checkpoint_bytes
from ldm.training.loop.stage import Stage
from ldm.training.loop.step import precision, prepare, take_step
from ldm.training.settings import Settings


@dataclass(frozen=True)
class Estimate:
    """Measured on one batch here and now; what else the machine does at the time is in it."""

    step_seconds: float
    memory_bytes: int  # the peak of a step: of this process on a CPU, of PyTorch's tensors on a GPU
    checkpoint_bytes: int
    lines: tuple[str, ...]  # the same in words


def estimate(stage: Stage, settings: Settings, batch: Any = None) -> Estimate:
    """Take two steps of `stage` on `batch` (None: its first one), then put all back as it was.

    The second one counts: the first makes what the optimizer keeps. Raises RuntimeError where memory runs out.
    """
    keep_memory()  # as the run will
    device = pick_device(settings.device)
    one = dataclasses.replace(settings, accumulation=1)
    with _put_back(stage.module.to(device)) as extra:
        state = prepare(stage, one, device)
        if batch is None:
            with precision(settings, device):
                batch = next(stage.batches(0))
        take_step(stage, state, one, itertools.repeat(batch))
        _forget_peak(device)
        began = _now(device)
        take_step(stage, state, one, itertools.repeat(batch))
        whole = _now(device) - began
        memory = _peak(device) - extra
        more = _backward_seconds(stage, state, settings, batch, device) if settings.accumulation > 1 else 0.0
        size = checkpoint_bytes(settings, state.module)
    each = whole + (settings.accumulation - 1) * more
    return Estimate(each, memory, size, _lines(settings, device, each, memory, size))


def _lines(settings: Settings, device: torch.device, each: float, memory: int, size: int) -> tuple[str, ...]:
    whole = timedelta(seconds=round(each * settings.steps))
    where = "in this process" if device.type == "cpu" else f"of tensors on {device.type}"
    return (
        f"time: about {whole} for {settings.steps} steps of {each:.2g} s (one was tried here, as busy as the machine is"
        " now); scores, sample grids and checkpoints come on top",
        f"memory: {format_bytes(memory)} {where} at the peak of that step",
        f"disk: {format_bytes(size)} a checkpoint, up to {settings.keep + 2} at a time",
    )


@contextmanager
def _put_back(module: nn.Module) -> Iterator[int]:
    """Whatever is done to what is trained of `module` inside is undone; yields the bytes that this needs."""
    own, training = module.state_dict(), module.training
    kept = {name: own[name].detach().clone() for name in trained_names(module)}
    try:
        yield sum(value.nbytes for value in kept.values())
    finally:
        module.train(training).zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in kept.items():
                own[name].copy_(value)


def _backward_seconds(stage: Stage, state: TrainState, settings: Settings, batch: Any, device: torch.device) -> float:
    """What one more micro-batch of a step takes."""
    began = _now(device)
    with precision(settings, device):
        loss = stage.loss(batch, state.step, 1)
    loss.backward()
    return _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))


def _peak(device: torch.device) -> int:
    """Bytes in use at the most since `_forget_peak`; on a CPU without /proc since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
