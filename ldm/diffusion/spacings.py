"""Noise spacings: which of the training timesteps a sampler with n steps visits. No torch here: --help lists them.

Each takes (total, n, offset, sampler) and returns n descending timesteps in [0, total - 1], float64. The families of
samplers divide differently (as their namesakes in diffusers do): DPM-Solver++ cuts n + 1 parts, DDIM rounds to whole
timesteps, Euler and all others do neither.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Spacing = Callable[[int, int, int, str], np.ndarray]

SPACINGS: dict[str, Spacing] = {}


def spacing(function: Spacing) -> Spacing:
    """List a spacing under its own name."""
    SPACINGS[function.__name__] = function
    return function


@spacing
def leading(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Multiples of T // n, plus an offset (Stable Diffusion 1.x and 2.x use 1); never reaches the last timestep."""
    if sampler.startswith("dpmpp"):
        return np.arange(n, 0, -1.0) * (total // (n + 1)) + offset
    return np.arange(n - 1, -1, -1.0) * (total // n) + offset


@spacing
def linspace(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Equal parts from T - 1 to 0, fractions included for Euler."""
    if sampler.startswith("dpmpp"):
        return np.linspace(0, total - 1, n + 1).round()[:0:-1]
    if n == 1:
        return np.array([total - 1.0])
    steps = np.linspace(0, total - 1, n, dtype=np.float64 if sampler == "ddim" else np.float32)
    return (steps.round() if sampler == "ddim" else steps)[::-1].astype(np.float64)


@spacing
def trailing(total: int, n: int, offset: int, sampler: str) -> np.ndarray:
    """Steps of T / n down from T - 1, which is always the first: what zero terminal SNR needs."""
    return np.arange(total, 0, -total / n)[:n].round() - 1
