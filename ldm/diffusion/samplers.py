"""Samplers: pure functions from noise to picture, over one denoiser and one list of sigmas.

Each takes (denoise, x, sigmas, noise, callback=None) and returns x at the last sigma, which is x0 where that is 0.
  denoise(x (B, C, H, W), sigma (B,)) -> x0
  x (B, C, H, W) = x0 + sigma * noise, scaled by Schedule.initial
  sigmas (n + 1,) descending, on the CPU, so that asking whether one is 0 costs no wait for the device
  noise(i) -> the i-th fresh draw (B, C, H, W), for samplers that add noise
  callback(i, x, x0) after each step
Importing this file does not import torch, so that --help can list SAMPLERS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
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


@sampler
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None, callback: Callback = None) -> Tensor:
    """Euler's method on dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 2 without churn): first order."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        d = (x - x0) / sigma
        x = x0 + sigma_next * d  # is x + (sigma_next - sigma) * d, less its cancellation at large sigma
        if callback:
            callback(i, x, x0)
    return x


@sampler
def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None, callback: Callback = None) -> Tensor:
    """DDIM, deterministic (Song et al. 2021, eq. 12 with eta 0): first order.

    Where the last sigma is not 0, the result keeps that much noise and has the network's scale, as the paper's x_t.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        x = x0 + (sigma_next / sigma) * (x - x0)
        if callback:
            callback(i, x, x0)
    return x / (1 + sigmas[-1] ** 2).sqrt()


@sampler
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = None, callback: Callback = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order with one evaluation a step."""
    x0_last = h_last = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        h = sigma.log() - sigma_next.log()  # infinite on a last step to 0, where x becomes x0
        d = x0 if x0_last is None or sigma_next == 0 else x0 + (x0 - x0_last) * (h / (2 * h_last))
        x = (sigma_next / sigma) * x - (-h).expm1() * d
        x0_last, h_last = x0, h
        if callback:
            callback(i, x, x0)
    return x
