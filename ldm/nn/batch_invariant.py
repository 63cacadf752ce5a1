"""Layers that give an image the same bits in every batch, in eval mode on a CPU; elsewhere they are PyTorch's own.

And how the numbers of an image lie in memory there.

A matrix product may sum in another order when it has another number of rows. Measured (20 numbers of rows from 15 to
1024, 11 widths, 2 to 34 images), it does so in fp32 where an image has less than 15 rows, and in bf16 where sums are
longer than 640 numbers. There it runs on blocks of a number of images that depends on the rows of one alone.

Elementwise functions compute whole vectors, and what is left over at the end of each thread's share with another exp.
So they go image by image, but where every share of every batch ends with a whole vector.

Memory that is taken anew for every sum costs more than the sum, so that sums are written over an input that nobody else
holds. Measured (the default model, 32 rows, fp32, one thread): with all that writes over its input, a call of the U-Net
takes 0.96 of the time (2 rows: 0.99). And on a CPU with AMX (2 and 16 rows, one thread) channels-last takes 0.74 and
0.95 of the time in fp32, and 1.3 in bf16. Of Stable Diffusion's widths bf16 gains by it too: convolutions with 1280 to
2560 channels at 8x8 and 16x16 take 0.57 to 0.88 of the time (one core of Zen 4, 2 rows), most of it for their weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

ROWS, INNER = 32, 512  # of an image in a matrix product, and the length of its sums: see above
WIDE = 256  # channels at a U-Net's first level, from which on channels-last is faster in bf16 too
VECTOR = 32  # numbers that PyTorch's elementwise functions compute at once, at most


class Linear(nn.Linear):
    """A linear layer that gives an image the same bits in every batch of the U-Net, in eval mode on a CPU."""

    def forward(self, x: Tensor) -> Tensor:  # (B, ..., in) -> (B, ..., out)
        if self.training or not x.is_cpu:
            return super().forward(x)
        return batch_invariant(super().forward, x, x[0].numel() // self.in_features)


class Pointwise(nn.Conv2d):
    """A 1x1 convolution; of a channels-last image on a CPU, the linear layer that it is."""

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, out, H, W)
        if self.training or not x.is_cpu:
            return super().forward(x)
        if x.is_contiguous():
            return in_blocks(super().forward, x, 2)
        h = x.permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, C)
        h = batch_invariant(lambda part: F.linear(part, self.weight.flatten(1), self.bias), h, h.shape[1])
        return h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def batch_invariant(product: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """product(x), a matrix product with so many rows for each image, with the same bits in every even batch."""
    if len(x) % 2 == 0 and rows >= ROWS and (x.dtype == torch.float32 or x.shape[-1] < INNER):
        return product(x)
    return in_blocks(product, x, max(2, ROWS // rows))


def per_image(function: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Tensor:
    """function(x) for an elementwise function, with the same bits for an image in every batch."""
    if training or not x.is_cpu or is_compiling() or x[0].numel() % _whole_shares(torch.get_num_threads()) == 0:
        return function(x)
    return in_blocks(function, x, 1)


@functools.cache
def _whole_shares(threads: int) -> int:
    """Numbers of which so many threads or fewer get whole vectors each."""
    return VECTOR * math.lcm(*range(1, threads + 1))


def silu(x: Tensor, training: bool) -> Tensor:
    """Of an x that nobody else holds: written over it where no gradient is wanted."""
    return per_image(partial(F.silu, inplace=not torch.is_grad_enabled()), x, training)


def added(h: Tensor, x: Tensor) -> Tensor:
    """h + x, for an h that nobody else holds: written over it where that changes nothing and no gradient is wanted.

    It lies in memory as x does, on which the bits of gradients depend, and the time of what comes next: group norm of
    (2, 96, 16, 16) in bf16 takes 25 us of a contiguous image and 460 us of a channels-last one (Zen 4).
    """
    alike = h.dtype == x.dtype and (h.stride() == x.stride() or h.shape != x.shape)
    return h.add_(x) if alike and not torch.is_grad_enabled() else x + h


def pad_to_even_batch(x: Tensor, *rest: Tensor | None) -> tuple[Any, ...]:
    """With their last row twice where x has an odd number on a CPU: convolutions may sum in another order there."""
    if len(x) % 2 and x.is_cpu:
        return tuple(t if t is None else torch.cat([t, t[-1:]]) for t in (x, *rest))
    return x, *rest


def in_blocks(layer: Callable[[Tensor], Tensor], x: Tensor, images: int) -> Tensor:
    """layer(x), computed on blocks of exactly so many images; the last one is filled up with zeros."""
    if is_compiling():
        return layer(x)  # compiled code gets two rows in every batch (see ldm.nn.compiled)
    short = -len(x) % images
    padded = torch.cat([x, x.new_zeros(short, *x.shape[1:])]) if short else x
    blocks = [layer(block) for block in padded.split(images)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[: len(x)]


def layout(device: torch.device, dtype: torch.dtype, config: object = None) -> torch.memory_format:
    """How a U-Net of this config, or what works beside it, wants its images and convolutions' weights to draw."""
    width = getattr(config, "block_out_channels", (0,))[0]
    fast = device.type == "cpu" and (dtype == torch.float32 or width >= WIDE)
    return torch.channels_last if fast else torch.contiguous_format
