"""The arithmetic of each guidance on raw answers of the network (B, C, H, W) fp32; weights w are (B, 1, 1, 1).

c with the prompt   u without it   p with the prompt and perturbed attention
Sums over an image are taken image by image: in one call, their order would depend on the batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def classifier_free(c: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Ho & Salimans 2022, eq. 6, whose w is ours less 1."""
    return u + w * (c - u)


def best_scale(c: Tensor, u: Tensor) -> Tensor:
    """(B, 1, 1, 1): the multiple of u that is nearest to c (Fan et al. 2025, section 4)."""
    return of_each_image(lambda c, u: (c * u).sum() / (u.square().sum() + 1e-8), c, u)


def projected(c: Tensor, change: Tensor, w: Tensor, eta: float, threshold: float) -> Tensor:
    """APG (Sadat et al. 2024) for `change` = c - u with its momentum: c + (w - 1) * what is left of it.

    The change is shortened to a norm of `threshold`, and its part along c is multiplied by eta.
    """
    if threshold > 0:
        norm = of_each_image(torch.linalg.vector_norm, change)
        change = change * (threshold / norm).clamp(max=1)
    exact = torch.float64 if c.device.type != "mps" else torch.float32
    change, along = change.to(exact), c.to(exact)
    unit = along / of_each_image(torch.linalg.vector_norm, along).clamp(min=1e-12)
    parallel = of_each_image(lambda a, b: (a * b).sum(), change, unit) * unit
    return c + (w - 1) * (change - parallel + eta * parallel).float()


def rescaled(guided: Tensor, c: Tensor, share: float) -> Tensor:
    """`guided` with a share of c's standard deviation restored (Lin et al. 2024, section 3.4)."""
    ratio = of_each_image(torch.std, c) / of_each_image(torch.std, guided)
    return share * (guided * ratio) + (1 - share) * guided


def of_each_image(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A number of each image, (B, 1, 1, 1)."""
    numbers = torch.stack([function(*image) for image in zip(*tensors)])
    return numbers.view(-1, *[1] * (tensors[0].ndim - 1))
