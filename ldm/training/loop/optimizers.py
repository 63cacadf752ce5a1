"""What moves the weights, and how far: AdamW, also in 8 bits, SGD or Muon, and their learning rate by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ldm.config import require
from ldm.training.checkpoints.state import trainable, trained_names
from ldm.training.loop.muon import TEXT, moved_names, muon
from ldm.training.settings import Settings


def make_optimizer(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the parameters of `module` that are trained."""
    require(bool(trainable(module)), f"nothing of {type(module).__name__} is trained", "model")
    return OPTIMIZERS[settings.optimizer](settings, module, device)


def _adamw(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return _adamw_of(settings, device, _groups(settings, trainable(module)))


def _adamw_of(settings: Settings, device: torch.device, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    s, fused = settings, device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay, fused=fused)


def _groups(settings: Settings, parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """All parameters in one group; those of a text encoder with a rate of its own in a second one.

    The step multiplies the learning rate by a group's `scale`.
    """
    rate = getattr(settings, "text_rate", 0)
    text = [p for name, p in parameters.items() if rate and name.startswith(TEXT)]
    others = [p for name, p in parameters.items() if not (rate and name.startswith(TEXT))]
    return [{"params": others}, *([{"params": text, "scale": rate / settings.learning_rate}] if text else [])]


def _adamw8bit(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Moments in 8 bits, in blocks (Dettmers et al. 2022); of tensors below 4096 numbers in 32."""
    import bitsandbytes

    s, groups = settings, _groups(settings, trainable(module))
    return bitsandbytes.optim.AdamW8bit(groups, lr=s.learning_rate, betas=s.betas, weight_decay=s.weight_decay)


def _sgd(settings: Settings, module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    groups = _groups(settings, trainable(module))
    return torch.optim.SGD(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay)


OPTIMIZERS: dict[str, Callable[[Settings, nn.Module, torch.device], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": partial(muon, groups=_groups, adamw=_adamw_of),
    "sgd": _sgd,
}


def checkpoint_bytes(settings: Settings, module: nn.Module) -> int:
    """The size of a checkpoint on disk once every parameter has been moved, to some KB; no optimizer is built."""
    tensors, parameters = module.state_dict(), trainable(module)
    size = 2 * sum(tensors[name].nbytes for name in trained_names(module))  # the weights and their average
    size += len(settings.ema_lengths) * sum(parameter.nbytes for parameter in parameters.values())
    moments = {"sgd": 0, "muon": 2, "adamw": 2, "adamw8bit": 2}[settings.optimizer]
    hidden = moved_names(settings, module) if settings.optimizer == "muon" else set()
    for name, parameter in parameters.items():
        if settings.optimizer == "adamw8bit" and parameter.numel() >= 4096:
            size += 2 * parameter.numel() * 65 // 64 + 2048  # 8 bits, a scale for each block of 256, two tables
        else:
            size += (1 if name in hidden else moments) * parameter.nbytes
    return size


# Learning rates by step: a linear warm-up, then what the settings name.


def _constant(settings: Settings, step: int) -> float:
    return 1.0


def _linear(settings: Settings, step: int) -> float:
    """1 until `decay_from` of the steps and the end of the warm-up, then linear to `final_lr` at the last step."""
    start = max(settings.warmup, settings.decay_from * settings.steps)
    return 1.0 if step < start else 1 - (1 - settings.final_lr) * (step - start) / max(1.0, settings.steps - start)


def _cosine(settings: Settings, step: int) -> float:
    """Half a wave from 1 at the end of the warm-up to `final_lr` at the last step (Loshchilov & Hutter 2017, eq. 5)."""
    done = max(0, step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.final_lr + (1 - settings.final_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


# What is left of the learning rate at a step, the warm-up aside.
SCHEDULES: dict[str, Callable[[Settings, int], float]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(settings: Settings, step: int) -> float:
    """The learning rate of the step-th step, counted from 0."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    return settings.learning_rate * warm * SCHEDULES[settings.lr_schedule](settings, step)
