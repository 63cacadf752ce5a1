"""Samplers that add no noise: solvers of dx/dsigma = (x - x0) / sigma (Karras et al. 2022, eq. 1), and DDIM.

Two-stage methods are written as Euler's step plus a gain times the change of x0, which is the same arithmetic without
the cancellation of x + (sigma_next - sigma) * slope at large sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.base import Callback, Noise, absent, ancestral, denoise_at, sampler

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.denoiser import Denoise

LMS_ORDER = 4
INFINITE = 1000.0  # a sigma above stands for infinity (4096 at zero terminal SNR), where a mean of slopes means nothing


@sampler
def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """Euler's method (Karras et al. 2022, algorithm 2 without churn): first order."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        d = (x - x0) / sigma
        x = x0 + sigma_next * d  # is x + (sigma_next - sigma) * d, less its cancellation at large sigma
        if callback:
            callback(i, x, x0)
    return x


@sampler
def ddim(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 0.0
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16): first order; with eta > 0 stochastic.

    Where the last sigma is not 0, the result keeps that much noise and has the network's scale, as the paper's x_t.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        down, up = ancestral(sigma.item(), sigma_next.item(), eta) if eta else (sigma_next, 0.0)
        x = x0 + (down / sigma) * (x - x0)
        if up:
            x = x + up * noise(i)
        if callback:
            callback(i, x, x0)
    return x / (1 + sigmas[-1] ** 2).sqrt()


def _two_stages(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback,
    second: Callable[[float, float], float],
    gain: Callable[[float, float], float],
) -> Tensor:
    """Euler's step, then a correction by gain(sigma, sigma_next) * (x0 at the second sigma - x0 at the first)."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        d = (x - x0) / sigma
        x = x0 + sigma_next * d
        if sigma_next > 0 and (weight := gain(sigma, sigma_next)):
            there = second(sigma, sigma_next)
            x = x + weight * (denoise_at(denoise, x0 + there * d, there) - x0)
        if callback:
            callback(i, x, x0)
    return x


@sampler
def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 2 without churn): second order, two evaluations a step."""

    def gain(s: float, s_next: float) -> float:
        return (s - s_next) / (2 * s_next) if s < INFINITE else 0.0

    return _two_stages(denoise, x, sigmas, callback, lambda s, s_next: s_next, gain)


@sampler
def heun_flow(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """Heun's method in flow's time t = sigma / (1 + sigma) on (1 - t) x: second order, two evaluations a step."""
    return _two_stages(
        denoise,
        x,
        sigmas,
        callback,
        lambda s, s_next: s_next,
        lambda s, s_next: (s - s_next) / (2 * s_next) * (1 + s_next) / (1 + s),
    )


@sampler
def dpm2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """DPM-Solver-2 as k-diffusion writes it (Lu et al. 2022, algorithm 1): midpoint in log sigma, second order."""

    def gain(s: float, s_next: float) -> float:
        return (s - s_next) / math.sqrt(s * s_next) if s < INFINITE else 0.0

    return _two_stages(denoise, x, sigmas, callback, lambda s, s_next: math.sqrt(s * s_next), gain)


@sampler
def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order with one evaluation a step."""
    x0_last, h_last = None, math.inf
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = denoise(x, sigma.expand(len(x)))
        h = sigma.log() - sigma_next.log()  # infinite on a last step to 0, where x becomes x0
        d = x0 if x0_last is None or sigma_next == 0 else x0 + (x0 - x0_last) * (h / (2 * h_last))
        x = (sigma_next / sigma) * x - (-h).expm1() * d
        x0_last, h_last = x0, h
        if callback:
            callback(i, x, x0)
    return x


def _corrector(h: float, h_last: float) -> tuple[float, float]:
    """Weights of the older and of the newer difference of x0 in UniC-2 with B(h) = e^h - 1 (Zhao et al. 2023)."""
    b = math.expm1(-h)
    first = (-b / h - 1) / b
    second = 2 * (-(-b / h - 1) / h - 0.5) / b
    older = (first - second) / (1 + h_last / h)
    return older, first - older


@sampler
def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """UniPC-2 on x0 with B2 (Zhao et al. 2023): third order with one evaluation a step."""
    x_last, x0_last, change = x, x, None
    ratio = h = h_last = math.inf
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        # Corrector: the last step once more, now that x0 at its end is known
        if i > 0:
            if change is None:
                slope = (x0 - x0_last) * 0.5
            else:
                older, newer = _corrector(h, h_last)
                slope = change * (older * h / h_last) + (x0 - x0_last) * newer
            x = ratio * x_last + (1 - ratio) * (x0_last + slope)
            change = x0 - x0_last
        # Predictor
        ratio = sigma_next / sigma
        h, h_last = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf, h
        d = x0 if change is None or sigma_next == 0 else x0 + change * (h / (2 * h_last))
        x_last, x0_last = x, x0
        x = ratio * x + (1 - ratio) * d
        if callback:
            callback(i, x, x0)
    return x


def _lagrange(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrals from start to end of the polynomials that are 1 at one node and 0 at the others; exact to degree 3."""
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))  # Gauss's two
    return [
        half * sum(math.prod((p - other) / (node - other) for other in nodes if other != node) for p in points)
        for node in nodes
    ]


@sampler
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """Linear multistep (Adams-Bashforth in sigma) over the last four slopes, one evaluation a step; begins as Euler."""
    slopes: list[Tensor] = []  # newest first
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x0 = denoise_at(denoise, x, sigma)
        d = (x - x0) / sigma
        slopes = [d, *slopes[: LMS_ORDER - 1]]
        nodes = levels[i : i - len(slopes) if i >= len(slopes) else None : -1]
        x = x0 + sigma_next * d
        for weight, older in list(zip(_lagrange(nodes, sigma, sigma_next), slopes))[1:]:
            x = x + weight * (older - d)
        if callback:
            callback(i, x, x0)
    return x
