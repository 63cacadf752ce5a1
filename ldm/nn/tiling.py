"""Big images through an autoencoder in overlapping tiles, in memory that does not grow with the image.

A tile alone has other group-norm statistics than the image, which shifts its colours (3/255 on average in the default
VAE). So the whole image, made as small as a tile, goes through first, and every norm keeps the statistics that it
sees there for all tiles. Attention, where an autoencoder has any, still sees one tile.

Shapes:  C channels   h, w size in latents   f pixels per latent
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldm import console
from ldm.nn.lora import clone_shared_weights

TILE, OVERLAP = 64, 16  # latents: a tile's side, and how much of it the next tile shares at least
AUTO = 128  # latents: images of more than this squared are decoded in tiles where nobody says whether

Module = TypeVar("Module", bound=nn.Module)


class SharedNorm(nn.Module):
    """A group norm that keeps the statistics of the first input that it sees. (1, C, …) -> (1, C, …)"""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm
        self.line: tuple[Tensor, Tensor] | None = None  # (C,) fp32: shift and scale, the norm of each channel

    def forward(self, x: Tensor) -> Tensor:
        if self.line is None:
            self._keep(x)
            return self.norm(x)
        shift, scale = (t.view(1, -1, *[1] * (x.ndim - 2)) for t in self.line)
        return torch.addcmul(shift, x.float(), scale).to(x.dtype)

    def _keep(self, x: Tensor) -> None:
        groups = x.float().reshape(self.norm.num_groups, -1)
        var, mean = torch.var_mean(groups, dim=1, correction=0)
        each = x.shape[1] // self.norm.num_groups
        std = (var + self.norm.eps).sqrt().repeat_interleave(each)
        scale = self.norm.weight.float() / std
        self.line = self.norm.bias.float() - mean.repeat_interleave(each) * scale, scale


def through_tiles(
    run: Callable[[Module, Tensor], Tensor], module: Module, x: Tensor, per_input: int, per_output: int, tile: int
) -> Tensor:
    """One input x (1, C, h * per_input, w * per_input) through run(module, part), tile by tile, in fp32:
    (1, C', h * per_output, w * per_output). Neighbours are blended by a ramp across what they share.

    per_input, per_output   numbers a latent has there along each side: 1, or f for pixels
    `module` stays as it is: its norms are replaced in a copy on the same weights.
    """
    h, w = (side // per_input for side in x.shape[-2:])
    module = clone_shared_weights(module)
    for name, norm in [(n, m) for n, m in module.named_modules() if isinstance(m, nn.GroupNorm)]:
        module.set_submodule(name, SharedNorm(norm))
    size = (min(h, tile) * per_input, min(w, tile) * per_input)
    small = run(module, _smaller(x, size, pixels=per_input > 1)).float()
    overlap = min(OVERLAP, tile // 2)
    places = list(product(spans(h, tile, overlap), spans(w, tile, overlap)))
    total = small.new_zeros(1, small.shape[1], h * per_output, w * per_output)
    weights = small.new_zeros(h * per_output, w * per_output)
    for (top, bottom), (left, right) in console.progress(places, desc="tiles", unit="tile", disable=len(places) < 9):
        rows, columns = (slice(a * per_input, b * per_input) for a, b in ((top, bottom), (left, right)))
        part = run(module, x[..., rows, columns]).float()
        rows, columns = (slice(a * per_output, b * per_output) for a, b in ((top, bottom), (left, right)))
        ramps = (
            ramp(a, b, side, overlap, per_output).to(part.device) for a, b, side in ((top, bottom, h), (left, right, w))
        )
        weight = torch.outer(*ramps)
        total[..., rows, columns] += part * weight
        weights[rows, columns] += weight
    return total / weights


def spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of the tiles of one side, evenly spread, that overlap by at least `overlap`."""
    if length <= tile:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [i * (length - tile) // (count - 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramp(start: int, end: int, length: int, overlap: int, scale: int) -> Tensor:
    """((end - start) * scale,) a tile's weight along one side: rising over the overlap at every end that is not the
    image's."""
    inside = (torch.arange((end - start) * scale) + 0.5) / (overlap * scale)
    rise = inside if start > 0 else torch.ones_like(inside)
    fall = inside.flip(0) if end < length else torch.ones_like(inside)
    return torch.minimum(rise, fall).clamp(max=1)


def _smaller(x: Tensor, size: tuple[int, int], pixels: bool) -> Tensor:
    """The whole input in a tile's size: pixels averaged, of latents some left out, which keeps their spread."""
    if x.shape[-2:] == size:
        return x
    here = x.float().cpu() if x.device.type == "mps" else x.float()  # MPS averages areas of equal size alone
    small = nn.functional.interpolate(here, size, mode="area" if pixels else "nearest-exact")
    return small.to(x.device, x.dtype)
