"""Learning rates by step: a linear warm-up, then what the settings name."""

from __future__ import annotations

import math
from collections.abc import Callable

from ldm.training.settings import Settings


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
