"""One denoiser for every prediction type: denoise(x, sigma) -> x0, a sampler's run, and the loss that trains it.

With x = x0 + sigma * noise:   x0 = c_skip * x + c_out * network(c_in * x, timestep)
Network: predict(x_in (B, C, H, W), timesteps (B,) fp32) -> raw (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ldm.device import sent
from ldm.diffusion.inpaint import Original, add_noise, mask_known_region
from ldm.diffusion.names import ETA, options
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.base import Callback, Noise, absent
from ldm.diffusion.schedule import PREDICTION_TYPES, Schedule
from ldm.errors import ConfigError, nearest

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def scalings(prediction_type: str, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, c_in) for a sigma of any shape (Karras et al. 2022, section 5)."""
    if prediction_type == "flow":  # x_t = (1 - t) x, x0 = x_t - t * raw, t = sigma / (1 + sigma)
        c_in = 1 / (1 + sigma)
        return c_in, -sigma * c_in, c_in
    c_in = 1 / (sigma**2 + 1).sqrt()
    if prediction_type == "epsilon":
        return torch.ones_like(sigma), -sigma, c_in
    if prediction_type == "v_prediction":
        return c_in**2, -sigma * c_in, c_in
    if prediction_type == "sample":
        return torch.zeros_like(sigma), torch.ones_like(sigma), c_in
    hint = nearest(str(prediction_type), PREDICTION_TYPES)
    raise ConfigError(f"unknown prediction_type '{prediction_type}'", hint=hint)


def precondition(
    schedule: Schedule, x: torch.Tensor, sigma: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(c_skip, c_out, the network's x in `dtype`, its timesteps) for x (B, C, H, W) at sigma (B,); all else is fp32."""
    sigma = sigma.cpu()  # where samplers have it; all that is made of it goes to a GPU at once
    numbers = torch.stack([*scalings(schedule.prediction_type, sigma.float()), schedule.timestep(sigma)])
    *factors, timesteps = sent(numbers, x.device)
    c_skip, c_out, c_in = (c.view(-1, *[1] * (x.ndim - 1)) for c in factors)
    return c_skip, c_out, (c_in * x).to(dtype), timesteps


def denoiser(predict: Predict, schedule: Schedule, dtype: torch.dtype = torch.float32) -> Denoise:
    """Wrap a network as denoise(x (B, C, H, W), sigma (B,)) -> x0 (B, C, H, W) fp32."""

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        c_skip, c_out, x_in, timesteps = precondition(schedule, x, sigma, dtype)
        return c_skip * x + c_out * predict(x_in, timesteps).float()

    return denoise


def consistency(denoise: Denoise, schedule: Schedule) -> Denoise:
    """`denoise` as a consistency model's map to x0, which is x itself at timestep 0 (Luo et al. 2023); for lcm.

    With sigma_data 0.5 and timesteps times 10, as published models were distilled and as diffusers has it.
    """

    def to_x0(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        scaled = schedule.timestep(sigma).double() * 10 / 0.5
        c_skip = 1 / ((scaled**2 + 1) * (1 + sigma.double() ** 2).sqrt())  # of x in the network's scale
        c_out = scaled / (scaled**2 + 1).sqrt()
        c_skip, c_out = sent(torch.stack([c_skip, c_out]), x.device, x.dtype).view(2, -1, *[1] * (x.ndim - 1))
        return c_skip * x + c_out * denoise(x, sigma)

    return to_x0


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    sigmas: torch.Tensor,
    start: torch.Tensor,
    sampler: str,
    *,
    noise: Noise = absent,
    spacing: str | None = None,
    eta: float | None = None,
    callback: Callback = None,
    original: Original | None = None,
) -> torch.Tensor:
    """Unit noise `start` (B, C, h, w) -> latents (B, C, h, w), by a sampler of SAMPLERS over `sigmas` (n + 1,).

    `noise` is needed by samplers that add some. `original`: the images to begin at (with the sigmas that
    `img2img_sigmas` leaves), or to keep where their mask says so. Raises ConfigError for an eta that cannot be.
    """
    if sampler == "lcm" and not schedule.is_flow:
        denoise = consistency(denoise, schedule)
    if original is None or original.from_noise:
        x = schedule.initial(start, sigmas, sampler, spacing)
    else:
        x = add_noise(original.latents, sigmas, start)
    if original is not None and original.mask is not None:
        denoise = mask_known_region(denoise, original, start, sigmas)
    more: dict = {} if eta is None else options(sampler, eta)
    if sampler == "tcd":
        more["down_to"] = schedule.earlier(sigmas[1:], more.get("eta", ETA["tcd"]))
    x = SAMPLERS[sampler](denoise, x, sigmas, noise, callback, **more)
    return x if original is None else original.keep(x, original.latents)  # ddim and tcd may end at a sigma above 0


def target(schedule: Schedule, x0: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
    """What the network should answer at x_t = alpha * x0 + sigma * noise; written out, never recovered by division."""
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "v_prediction":
        return alpha * noise - sigma * x0  # Salimans & Ho 2022
    if schedule.prediction_type == "sample":
        return x0
    return noise - x0  # flow: d x_t / d t (Lipman et al. 2023; Liu et al. 2023)


def min_snr_weight(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """(B,) loss weights min(SNR, gamma) of the loss in x0, for each prediction type (Hang et al. 2023, eq. 9).

    Written so that SNR 0 gives a finite weight: 1 for epsilon, 0 for v, sample and flow at the very end.
    """
    snr = (alpha / sigma) ** 2
    if prediction_type == "epsilon":
        return (snr_gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return snr.clamp(max=snr_gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp(max=snr_gamma)
    return torch.minimum(alpha**2, snr_gamma * sigma**2)  # flow: x0's error is t times the velocity's


def training_loss(*inputs: Any, **options: Any) -> torch.Tensor:
    """The loss of `training_losses`, (B,) fp32."""
    return training_losses(*inputs, **options)[0]


def training_losses(
    predict: Predict,
    schedule: Schedule,
    x0: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
    teacher: Predict | None = None,
    contrast: float = 0.0,
    mask: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, the same without `contrast`): mean squared error of the network's answer, a number per image, (B,) fp32.

    x0, noise (B, C, H, W); timesteps (B,): integers in [0, T) for betas, floats in (0, 1) for flow.
    snr_gamma: min-SNR weighting (5 is usual); None: every timestep weighs the same.
    teacher: its answer is the target in place of the one that x0 and noise give; it gets no gradients.
    contrast: weight of the error against another image's target, which is subtracted, so that answers stay apart
    (contrastive flow matching, Stoica et al. 2025, eq. 6; 0.05 is usual).
    other: these targets (B, C, H, W); without them each image gets that of the one before it in the batch.
    mask: (B, 1, H, W) in [0, 1]: how much each place counts; an image without any place has loss 0.
    """
    x0, noise = x0.float(), noise.float()
    numbers = torch.stack([*schedule.alpha_sigma(timesteps), schedule.network_timesteps(timesteps)])
    alpha, sigma, told = sent(numbers, x0.device)  # (B,)
    a, s = (c.view(-1, *[1] * (x0.ndim - 1)) for c in (alpha, sigma))
    inputs = (a * x0 + s * noise, told)
    answer = target(schedule, x0, noise, a, s)
    if teacher is not None:
        with torch.no_grad():
            answer = teacher(*inputs).float()
    predicted = predict(*inputs).float()
    loss = plain = mean_square(predicted - answer, mask)
    if contrast:
        loss = plain - contrast * mean_square(predicted - (answer.roll(1, 0) if other is None else other), mask)
    if snr_gamma is not None:
        weight = min_snr_weight(schedule.prediction_type, alpha, sigma, snr_gamma)
        loss, plain = loss * weight, plain * weight
    return loss, plain


def mean_square(error: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B,) of errors (B, C, H, W), over the places of a mask (B, 1, H, W)."""
    if mask is None:
        return error.square().flatten(1).mean(1)
    return (error.square().mean(1, keepdim=True) * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-3)


def x0_error(
    predict: Predict,
    schedule: Schedule,
    x0: torch.Tensor,
    noise: torch.Tensor,
    u: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Error (B,) of the network's x0 at sigma = tan(pi/2 u), u (B,) in (0, 1), in units of the v loss.

    (its x0 - x0)^2 / sin^2(pi/2 u) is the loss of v-prediction whatever the network predicts, so that models of
    different prediction types can be compared by it. x0, noise (B, C, H, W); mask: that of `training_loss`.
    """
    angle = torch.pi / 2 * u
    wide = (-1, *[1] * (x0.ndim - 1))
    predicted = denoiser(predict, schedule)(x0 + angle.tan().view(wide) * noise, angle.tan())
    return mean_square((predicted - x0) / angle.sin().view(wide), mask)
