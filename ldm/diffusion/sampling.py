"""One sampling run, from the first noise to latents: what drawing and the sample grids of a training share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Predict, consistency, denoiser
from ldm.diffusion.inpaint import Original, begin, keeping
from ldm.diffusion.names import options
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule

if TYPE_CHECKING:
    from ldm.diffusion.samplers.base import Callback, Noise


def sample(
    predict: Predict,
    schedule: Schedule,
    sigmas: Tensor,
    start: Tensor,
    sampler: str,
    *,
    noise: Noise = None,
    spacing: str | None = None,
    eta: float | None = None,
    dtype: torch.dtype = torch.float32,
    callback: Callback = None,
    original: Original | None = None,
) -> Tensor:
    """Unit noise `start` (B, C, h, w) -> latents (B, C, h, w), by a sampler of SAMPLERS over `sigmas` (n + 1,).

    predict is the network, in `dtype`, with its conditions bound. `noise` is needed by samplers that add some.
    `original`: the pictures to begin at (with the sigmas that `remaining` leaves), or to keep where it says so.
    """
    denoise = denoiser(predict, schedule, dtype)
    if sampler == "lcm":
        denoise = consistency(denoise, schedule)
    whole = original is None or original.from_noise
    x = schedule.initial(start, sigmas, sampler, spacing) if whole else begin(original, sigmas, start)
    masked = original is not None and original.repaint is not None
    if masked:
        denoise = keeping(denoise, original, start, sigmas)
    x = SAMPLERS[sampler](denoise, x, sigmas, noise, callback, **options(sampler, eta))
    return torch.where(original.repaint, x, original.latents) if masked else x  # ddim may end at a sigma above 0
