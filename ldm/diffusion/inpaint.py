"""Drawing that begins at a picture or keeps part of one: image-to-image, inpainting, and blended first noises.

All of it is about x and x0, so that it goes with every sampler: they compute pixel by pixel.

Shapes:  B batch   C latent channels   h, w latent size   n number of sampling steps
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.denoiser import Denoise
from ldm.errors import ConfigError

PARALLEL = 0.9995  # mean cosine above which two noises are one and the same, so that an arc between them has no length


@dataclass(frozen=True)
class Original:
    """The pictures that a sampling run begins at, or keeps a part of."""

    latents: Tensor  # (B, C, h, w)
    repaint: Tensor | None = None  # (B, 1, h, w) bool: where the run paints, the rest stays; None: it paints everywhere
    from_noise: bool = False  # begin at noise alone, as the run of a whole picture does, instead of original plus noise


def steps_left(n: int, strength: float, where: str = "strength") -> int:
    """How many of n steps image-to-image runs: min(int(n * strength), n), as in diffusers. Raises ConfigError at 0."""
    steps = min(int(n * strength), n)
    if steps < 1:
        least = math.ceil(1000 / n) / 1000
        todo = f"use at least {least:g}, or more steps"
        raise ConfigError(f"{strength:g} of {n} steps leaves none", where=where, todo=todo)
    return steps


def img2img_sigmas(sigmas: Tensor, strength: float, where: str = "strength") -> Tensor:
    """The end of `sigmas` (n + 1,) that image-to-image runs through. Raises ConfigError where no step is left."""
    n = len(sigmas) - 1
    return sigmas[n - steps_left(n, strength, where) :]


def begin(original: Original, sigmas: Tensor, noise: Tensor) -> Tensor:
    """x (B, C, h, w) at the first of `sigmas`: the original under that much of the unit noise (SDEdit, Meng et al.)."""
    return original.latents + sigmas[0].to(noise.device) * noise


def keeping(denoise: Denoise, original: Original, noise: Tensor, sigmas: Tensor) -> Denoise:
    """`denoise` that sees, where nothing is repainted, the original at the right noise, and answers it there.

    It is the blending after each step of latent diffusion's inpainting, said before the next evaluation: a sampler's
    own x is then the same where it paints. `noise` (B, C, h, w) is the run's first, the same at every step. At the
    first of `sigmas` a run that begins `from_noise` sees that noise everywhere, as in diffusers.
    """
    first = sigmas[0].item() if original.from_noise else math.inf

    def kept(x: Tensor, sigma: Tensor) -> Tensor:
        if float(sigma[0]) < first:
            level = sigma.to(x.device, x.dtype).view(-1, *[1] * (x.ndim - 1))
            x = torch.where(original.repaint, x, original.latents + level * noise)
        return torch.where(original.repaint, denoise(x, sigma), original.latents)

    return kept


def with_mask(predict: Callable[..., Tensor], repaint: Tensor, masked: Tensor) -> Callable[..., Tensor]:
    """The network of a 9-channel inpainting model as one of x alone: predict(x (R, C, h, w), ...).

    Its input is (x, the mask, latents of the picture without what the mask covers): repaint (B, 1, h, w) bool, masked
    (B, C, h, w), repeated for each of the R / B conditions. Neither is scaled as x is.
    """
    extra = torch.cat([repaint.to(masked.dtype), masked], dim=1)

    def inpainting(x: Tensor, *args, **kwargs) -> Tensor:
        rows = extra.repeat(len(x) // len(extra), 1, 1, 1).to(x.dtype)
        return predict(torch.cat([x, rows], dim=1), *args, **kwargs)

    return inpainting


def blended(noise: Tensor, other: Tensor, strength: float) -> Tensor:
    """Two unit noises of one picture (C, h, w) mixed along the arc between them: 0 gives `noise`, 1 gives `other`.

    A1111's variations (modules/rng.py: slerp), to the choice of dimension: each column of h numbers turns by its own
    angle. Shoemake 1985: (sin((1 - s) a) low + sin(s a) high) / sin(a).
    """
    cosine = torch.nn.functional.cosine_similarity(noise, other, dim=1)  # (C, w)
    if cosine.mean() > PARALLEL:
        return (1 - strength) * noise + strength * other
    angle = cosine.clamp(-1, 1).acos()
    low, high = (torch.sin(part * angle) / angle.sin() for part in (1 - strength, strength))
    return low.unsqueeze(1) * noise + high.unsqueeze(1) * other
