"""Small images of latents without decoding: one linear map to RGB for each autoencoder, fitted when first asked for.

Shapes:  B batch   C latent channels   h, w latent size   f pixels per latent   N fitted latents
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from ldm.nn.vae import VAE

COUNT, SIDE = 16, 16  # coloured images that are fitted to, and their side in latents
_known: WeakKeyDictionary[VAE, Tensor] = WeakKeyDictionary()


def preview(vae: VAE, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> images (B, 3, h, w) in [-1, 1] on the CPU, one pixel a latent."""
    table = rgb_map(vae)
    z = latents.detach().float().cpu()
    rgb = torch.einsum("bchw,cr->brhw", z, table[:-1]) + table[-1].view(1, 3, 1, 1)
    return rgb.clamp(-1, 1)


def rgb_map(vae: VAE) -> Tensor:
    """(C + 1, 3) fp32: what each latent channel adds to red, green and blue, and their bias in the last row.

    Least squares over the latents of coloured shapes, made by a seed: the same for the same autoencoder.
    """
    if vae not in _known:
        _known[vae] = _fitted(vae)
    return _known[vae]


@torch.no_grad()
def _fitted(vae: VAE) -> Tensor:
    images = shapes(COUNT, SIDE * vae.factor)
    latents = torch.cat([vae.encode(one).cpu() for one in images.split(1)])
    seen = latents.permute(0, 2, 3, 1).flatten(0, 2).double()  # (N, C)
    seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
    colours = functional.avg_pool2d(images, vae.factor).permute(0, 2, 3, 1).flatten(0, 2).double()  # (N, 3)
    return torch.linalg.lstsq(seen, colours).solution.float()


def shapes(count: int, side: int, seed: int = 0) -> Tensor:
    """(count, 3, side, side) in [-1, 1]: ellipses and rectangles over a gradient between two colours, by the seed."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    line = torch.linspace(0, 1, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    images = []
    for _ in range(count):
        corner, other = 2 * draw(2, 3, 1, 1) - 1
        slope = draw(2)
        along = (slope[0] * x + slope[1] * y) / slope.sum()
        image = corner + along * (other - corner)  # (3, side, side)
        for round_one in (True, False, True):
            (left, top), (wide, high) = draw(2) * 0.8, 0.15 + 0.4 * draw(2)
            if round_one:
                inside = ((x - left) / wide) ** 2 + ((y - top) / high) ** 2 < 1
            else:
                inside = (x > left) & (x < left + wide) & (y > top) & (y < top + high)
            colour = (3 * draw(3, 1, 1) - 1.5).clamp(-1, 1)  # pure ones often
            image = torch.where(inside, colour, image)
        images.append(image)
    return torch.stack(images)
