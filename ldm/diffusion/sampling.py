"""One sampling run, from the first noise to latents: what `generate` and the sample grids of a training share."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise, consistency
from ldm.diffusion.inpaint import Original, add_noise, mask_known_region
from ldm.diffusion.names import options
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.samplers.base import Callback, Noise, absent
from ldm.diffusion.schedule import Schedule


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    sigmas: Tensor,
    start: Tensor,
    sampler: str,
    *,
    noise: Noise = absent,
    spacing: str | None = None,
    eta: float | None = None,
    callback: Callback = None,
    original: Original | None = None,
) -> Tensor:
    """Unit noise `start` (B, C, h, w) -> latents (B, C, h, w), by a sampler of SAMPLERS over `sigmas` (n + 1,).

    `noise` is needed by samplers that add some. `original`: the images to begin at (with the sigmas that
    `img2img_sigmas` leaves), or to keep where their mask says so. Raises ConfigError for an eta that cannot be.
    """
    if sampler == "lcm":
        denoise = consistency(denoise, schedule)
    if original is None or original.from_noise:
        x = schedule.initial(start, sigmas, sampler, spacing)
    else:
        x = add_noise(original.latents, sigmas, start)
    if original is not None and original.mask is not None:
        denoise = mask_known_region(denoise, original, start, sigmas)
    x = SAMPLERS[sampler](denoise, x, sigmas, noise, callback, **({} if eta is None else options(sampler, eta)))
    return x if original is None else original.keep(x, original.latents)  # ddim may end at a sigma above 0
