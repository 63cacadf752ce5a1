"""Samplers that add noise: one draw a step (dpmpp_sde two), none on a step to 0 or where eta is 0."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from ldm.diffusion.samplers.base import Callback, Noise, absent, ancestral, denoise_at, sampler

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.denoiser import Denoise


@sampler
def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 1.0
) -> Tensor:
    """Euler's method to a lower sigma, and noise back up to the next (k-diffusion): first order."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        x = x0 + (down / sigma) * (x - x0)
        if up > 0:
            x = x + up * noise(i)
        if callback:
            callback(i, x, x0)
    return x


@sampler
def ddpm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """DDPM (Ho et al. 2020, algorithm 2 with eq. 7's posterior variance) over any list of sigmas."""
    return euler_ancestral(denoise, x, sigmas, noise, callback, eta=1.0)  # the same step, written in sigmas


@sampler
def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1) to a lower sigma, and noise back up; two evaluations a step."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = d = denoise_at(denoise, x, sigma)
        down, up = ancestral(sigma, sigma_next, eta)
        if down > 0:
            middle = math.sqrt(sigma * down)
            d = denoise_at(denoise, x0 + (middle / sigma) * (x - x0), middle)
        x = d + (down / sigma) * (x - d)
        if up > 0:
            x = x + up * noise(i)
        if callback:
            callback(i, x, x0)
    return x


@sampler
def dpmpp_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(2S) for the stochastic equation (k-diffusion's dpmpp_sde with r = 1/2): two evaluations a step.

    Both stages begin at sigma: the first one's noise is a Brownian path's increment over [middle, sigma], the second
    one's over [sigma_next, sigma], divided by their lengths' roots. Two fresh draws are the increments over the two
    parts, and the whole is their sum.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = d = denoise_at(denoise, x, sigma)
        draws = (noise(2 * i), noise(2 * i + 1)) if eta and sigma_next > 0 else None
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            down, up = ancestral(sigma, middle, eta)
            x_middle = x0 + (down / sigma) * (x - x0)
            d = denoise_at(denoise, x_middle if draws is None else x_middle + up * draws[0], middle)
        down, up = ancestral(sigma, sigma_next, eta)
        x = d + (down / sigma) * (x - d)
        if draws is not None:
            part = (sigma - middle) / (sigma - sigma_next)
            x = x + up * math.sqrt(part) * draws[0] + up * math.sqrt(1 - part) * draws[1]
        if callback:
            callback(i, x, x0)
    return x


@sampler
def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 1.0
) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint (Lu et al. 2022): one evaluation a step; eta 0 is dpmpp_2m."""
    x0_last, h_last = None, math.inf
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        if sigma_next == 0:
            x = x0
        else:
            h = math.log(sigma / sigma_next)
            d = x0 if x0_last is None else x0 + (x0 - x0_last) * (h / (2 * h_last))
            x = math.exp(-(1 + eta) * h) * x - math.expm1(-(1 + eta) * h) * d
            if eta:
                x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise(i)
            x0_last, h_last = x0, h
        if callback:
            callback(i, x, x0)
    return x


@sampler
def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None, eta: float = 1.0
) -> Tensor:
    """SDE-DPM-Solver++(3M) with k-diffusion's coefficients: three x0 a step, one evaluation.

    Its last term is half of Taylor's, there as here, which leaves it second order (with a smaller error than 2M).
    """
    x0_last = change_last = None
    h_last = h_older = math.inf
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        if sigma_next == 0:
            x = x0
        else:
            h = math.log(sigma / sigma_next)
            h_eta = (1 + eta) * h
            phi_2 = math.expm1(-h_eta) / h_eta + 1
            x = math.exp(-h_eta) * x - math.expm1(-h_eta) * x0
            change = None if x0_last is None else (x0 - x0_last) * (h / h_last)  # h times the slope of x0
            if change is not None and change_last is not None:
                older = change_last * (h / h_last)  # change_last was taken with the h of its own step
                d2 = (change - older) * (h / (h_last + h_older))
                x = x + phi_2 * (change + d2 * (h_last / h)) - (phi_2 / h_eta - 0.5) * d2
            elif change is not None:
                x = x + phi_2 * change
            if eta:
                x = x + sigma_next * math.sqrt(-math.expm1(-2 * eta * h)) * noise(i)
            x0_last, change_last, h_last, h_older = x0, change, h, h_last
        if callback:
            callback(i, x, x0)
    return x


@sampler
def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise = absent, callback: Callback = None) -> Tensor:
    """Latent consistency models (Luo et al. 2023): x0 at once, and noise back up to the next sigma.

    Wants `denoiser.consistency` around the denoiser: the network is then a map to x0 that keeps x where sigma is 0.
    For flow the denoiser is such a map by itself.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x = x0 = denoise_at(denoise, x, sigma)
        if sigma_next > 0:
            x = x0 + sigma_next * noise(i)
        if callback:
            callback(i, x, x0)
    return x


@sampler
def tcd(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise = absent,
    callback: Callback = None,
    eta: float = 0.3,
    down_to: Tensor | None = None,
) -> Tensor:
    """Trajectory consistency distillation (Zheng et al. 2024): below the next sigma, and noise up to it; eta is gamma.

    down_to (n,): where each step goes before noise is added (`Schedule.earlier`); None: 1 - eta of the next sigma. The
    last step adds none and stays there. Where that is not 0, the result has the network's scale, as ddim's.
    """
    lower = (sigmas[1:] * (1 - eta) if down_to is None else down_to).tolist()
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        x0 = denoise_at(denoise, x, sigma)
        down = sigma_next if eta == 0 else lower[i]
        x = x0 + (down / sigma) * (x - x0)
        if down < sigma_next and i < len(lower) - 1:
            x = x + math.sqrt((sigma_next - down) * (sigma_next + down)) * noise(i)
        if callback:
            callback(i, x, x0)
    return x / math.sqrt(1 + lower[-1] ** 2)
