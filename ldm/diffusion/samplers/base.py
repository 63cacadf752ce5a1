"""What every sampler uses: the registry, one call of the denoiser, and how an ancestral step divides its noise.

Inside a sampler a sigma is a Python float (float64), so that coefficients lose nothing where sigma reaches 4096 and
more; x keeps its own precision, and every operation on it is elementwise, so that an image's bits do not depend on
its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.denoiser import Denoise

Noise = Callable[[int], Any]  # (i) -> the i-th draw
Callback = Callable[[int, Any, Any], Any] | None  # (i, x, x0)

SAMPLERS: dict[str, Callable[..., Tensor]] = {}


def absent(i: int) -> Tensor:
    """Stands for the noise of a run that is given none."""
    raise TypeError("the sampler adds noise, and was given none")


def sampler(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """List a sampler under its own name."""
    SAMPLERS[function.__name__] = function
    return function


def denoise_at(denoise: Denoise, x: Tensor, sigma: float) -> Tensor:
    """x0 (B, C, H, W) for x at one sigma."""
    return denoise(x, x.new_full((len(x),), sigma, device="cpu"))


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """(sigma to step down to, standard deviation of the noise that lifts x to sigma_next again).

    eta 1 is the posterior of a step (Ho et al. 2020, eq. 7), eta 0 the ordinary differential equation.
    """
    up = min(sigma_next, eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2))
    return math.sqrt((sigma_next - up) * (sigma_next + up)), up
