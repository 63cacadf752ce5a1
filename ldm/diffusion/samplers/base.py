"""What every sampler uses: the registry, one evaluation of the denoiser, and how an ancestral step divides its noise.

Inside a sampler a sigma is a Python float (float64), so that coefficients lose nothing where sigma reaches 4096 and
more; x keeps its own precision, and every operation on it is elementwise, so that a picture's bits do not depend on
its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.denoiser import Denoise

    Noise = Callable[[int], Tensor] | None
    Callback = Callable[[int, Tensor, Tensor], None] | None

SAMPLERS: dict[str, Callable[..., Tensor]] = {}


def sampler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """List a sampler under its own name; it runs without gradients."""

    @wraps(function)
    def without_gradients(*args, **kwargs):
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    SAMPLERS[function.__name__] = without_gradients
    return without_gradients


def evaluate(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """x0 (B, C, H, W) for x at one sigma."""
    return denoise(x, x.new_full((len(x),), sigma, device="cpu"))


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma to step down to, standard deviation of the noise that lifts x to sigma_next again).

    eta 1 is the posterior of a step (Ho et al. 2020, eq. 7), eta 0 the ordinary differential equation.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt((sigma_next - up) * (sigma_next + up)), up
