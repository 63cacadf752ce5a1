"""Image-to-image, inpainting, and variations: sampling that begins at an image, or keeps a part of one.

All of it is about x and x0, so that it goes with every sampler: they compute pixel by pixel.

Shapes:  B batch   C latent channels   h, w latent size   n number of sampling steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.device import sent
from ldm.errors import ConfigError

if TYPE_CHECKING:
    from ldm.diffusion.denoiser import Denoise

PARALLEL = 0.9995  # mean cosine above which two noises are one and the same, so that an arc between them has no length


@dataclass(frozen=True)
class Original:
    """The images that a sampling run begins at, or keeps a part of."""

    latents: Tensor  # (B, C, h, w)
    mask: Tensor | None = None  # (B, 1, h, w) bool: True where the run paints; None: it paints everywhere
    from_noise: bool = False  # begin at noise alone, as text-to-image does, instead of original plus noise

    def keep(self, x: Tensor, known: Tensor) -> Tensor:
        """x (B, C, h, w) where the run paints, `known` elsewhere."""
        return x if self.mask is None else torch.where(self.mask, x, known)


def steps_left(n: int, strength: float, where: str = "strength") -> int:
    """How many of n steps image-to-image runs: min(int(n * strength), n), as in diffusers. Raises ConfigError at 0."""
    steps = min(int(n * strength), n)
    if steps < 1:
        least = math.ceil(1000 / n) / 1000
        hint = f"use at least {least:g}, or more steps"
        raise ConfigError(f"{strength:g} of {n} steps leaves none", where=where, hint=hint)
    return steps


def steps_before(left: int, strength: float) -> int:
    """The fewest steps of which `strength` (above 0, up to 1) leaves so many: the inverse of `steps_left`."""
    n = max(left, math.floor(left / strength) - 1)
    while int(n * strength) < left:
        n += 1
    return n


def img2img_sigmas(sigmas: Tensor, strength: float, where: str = "strength") -> Tensor:
    """The end of `sigmas` (n + 1,) that image-to-image runs through. Raises ConfigError where no step is left."""
    n = len(sigmas) - 1
    return sigmas[n - steps_left(n, strength, where) :]


def add_noise(latents: Tensor, sigmas: Tensor, noise: Tensor) -> Tensor:
    """x (B, C, h, w) at the first of `sigmas`: latents under that much of the unit noise (SDEdit, Meng et al.)."""
    return latents + sigmas[0] * noise


def mask_known_region(denoise: Denoise, original: Original, noise: Tensor, sigmas: Tensor) -> Denoise:
    """`denoise` that gets the original at the right noise where the mask is False, and returns it there.

    This is the blending after each step of latent diffusion's inpainting, moved to the beginning of the next
    evaluation: a sampler's own x is then the same where it paints. `noise` (B, C, h, w) is the run's first, the same at
    every step. At the first of `sigmas` a run `from_noise` gets that noise everywhere, as in diffusers.
    """
    first = sigmas[0].item() if original.from_noise else math.inf

    def masked(x: Tensor, sigma: Tensor) -> Tensor:
        if float(sigma[0]) < first:
            level = sent(sigma, x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
            x = original.keep(x, original.latents + level * noise)
        return original.keep(denoise(x, sigma), original.latents)

    return masked


def with_mask(network: Callable[..., Tensor], mask: Tensor, masked: Tensor) -> Callable[..., Tensor]:
    """The network of a 9-channel inpainting model as one of x alone: network(x (R, C, h, w), ...).

    Its input is (x, the mask, latents of the image without what the mask covers): mask (B, 1, h, w) bool, masked
    (B, C, h, w), repeated for each of the R / B conditions. Neither is scaled as x is.
    """
    extra = torch.cat([mask.to(masked.dtype), masked], dim=1)

    def inpainting(x: Tensor, *args, **kwargs) -> Tensor:
        rows = extra.repeat(len(x) // len(extra), 1, 1, 1).to(x.dtype)
        return network(torch.cat([x, rows], dim=1), *args, **kwargs)

    return inpainting


def slerp(noise: Tensor, other: Tensor, strength: float) -> Tensor:
    """Two unit noises of one image (C, h, w) mixed along the arc between them: 0 gives `noise`, 1 gives `other`.

    A1111's variations (modules/rng.py), including its choice of dimension: each column of h numbers turns by its own
    angle. Shoemake 1985: (sin((1 - s) a) low + sin(s a) high) / sin(a).
    """
    cosine = torch.nn.functional.cosine_similarity(noise, other, dim=1)  # (C, w)
    if cosine.mean() > PARALLEL:
        return (1 - strength) * noise + strength * other
    angle = cosine.clamp(-1, 1).acos()
    low, high = (torch.sin(part * angle) / angle.sin() for part in (1 - strength, strength))
    return low.unsqueeze(1) * noise + high.unsqueeze(1) * other
