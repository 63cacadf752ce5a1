"""Where a token stands: angles that turn queries and keys (FLUX), or waves that are added to patches (SD3); and the
waves of a guidance scale (LCM).

Shapes:  B batch   S text tokens   T = S + rows*columns, the text first
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cosines, sines of each token's angles: (T, head size / 2) fp32


def rotated(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair of channels of x (B, T, heads, head size) by its angle (Su et al. 2021), in fp32."""
    cosines, sines = (t[:, None] for t in rope)  # (T, 1, head size / 2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cosines - b * sines, b * cosines + a * sines], dim=-1).flatten(-2).to(x.dtype)


def rope_of(axes: tuple[int, ...], tokens: int, rows: int, columns: int, device: torch.device) -> Rope:
    """Angles of S = tokens of text, all at (0, 0, 0), and of an image's patches at (0, row, column)."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    count = partial(torch.arange, dtype=dtype, device=device)
    image = torch.zeros(rows, columns, 3, dtype=dtype, device=device)
    image[..., 1], image[..., 2] = count(rows)[:, None], count(columns)
    positions = F.pad(image.flatten(0, 1), (0, 0, tokens, 0))  # (T, 3)
    angles = [positions[:, i, None] * 10000.0 ** -(count(0, n, 2) / n) for i, n in enumerate(axes)]
    joined = torch.cat(angles, dim=-1)  # (T, head size / 2)
    return joined.cos().float(), joined.sin().float()


def sincos_positions(width: int, size: int, base: int) -> Tensor:
    """(1, size², width): sines and cosines of the column, then of the row, in units of a grid of `base` patches."""
    positions = (torch.arange(size, dtype=torch.float32) / (size / base)).double()
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = positions[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1).float()  # (size, width / 2)
    return torch.cat([waves.repeat(size, 1), waves.repeat_interleave(size, dim=0)], dim=-1)[None]


def guidance_waves(scales: Tensor, channels: int) -> Tensor:
    """Guidance scales (B,) -> (B, channels): sines, then cosines, of 1000 (scale - 1), as LCM was distilled with it.

    Luo et al. 2023; the frequencies end at 1/10000 exactly, one step later than those of `sinusoidal`.
    """
    half = channels // 2
    steps = torch.arange(half, dtype=torch.float32, device=scales.device)
    frequencies = torch.exp(-math.log(10000) * steps / (half - 1))
    angles = 1000 * (scales.float() - 1)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
