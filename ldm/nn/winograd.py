"""Convolutions of 3x3 by Winograd's algorithm, where a CPU draws in fp32: a quarter of the multiplications.

Measured (two cores with AMX, torch 2.13): the default model's U-Net takes 0.80 of the time with 16 rows, 0.89 with 4,
0.98 with 2; convolutions of SD 1.5 with 2 rows 0.46 at 320 channels and 64x64, 0.35 at 640 and 32x32.

Lavin & Gray 2016 (arXiv 1509.09308), F(4x4, 3x3): each tile of 4x4 outputs is y = Aᵀ [(G g Gᵀ) * (Bᵀ d B)] A of the
6x6 inputs d around it and the kernel g. The product in brackets, summed over channels, is 36 matrix products. With the
points 0, 1, -1, 1/2, -2 (Barabasz et al. 2020) the rounding errors are 2.8 times those of the direct sum (rms 1.8e-6 of
outputs of unit variance; 192 channels), with Lavin and Gray's 4.4 times.

Shapes:  N images   C, O channels in, out   h, w tiles down, across   T = N*h*w
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE, PATCH = 4, 6  # sides of a tile of outputs, and of the inputs that it is made of
NARROW = 64  # channels, in or out, below which there is nothing to gain
LARGEST = 64 << 20  # bytes of a transformed kernel; larger ones are for small pictures, and would fill the memory
AT_ONCE = 4 << 20  # bytes of transformed inputs, or as many as the kernel has: for the caches, and for the allocator

B_T = ((1, -3 / 2, -2, 3 / 2, 1, 0), (0, -1, 1 / 2, 5 / 2, 1, 0), (0, 1, -5 / 2, 1 / 2, 1, 0))
B_T += ((0, -2, -1, 2, 1, 0), (0, 1 / 2, -1, -1 / 2, 1, 0), (0, 1, -3 / 2, -2, 3 / 2, 1))
G = ((1, 0, 0), (1 / 3, 1 / 3, 1 / 3), (-1 / 3, 1 / 3, -1 / 3), (-16 / 15, -8 / 15, -4 / 15), (1 / 15, -2 / 15, 4 / 15))
G += ((0, 0, 1),)
A_T = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1))


def _matrix(rows: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


INPUTS = _matrix(B_T).float()  # (6, 6), for one direction at a time
KERNEL = torch.kron(_matrix(G), _matrix(G))  # (36, 9), for both directions
OUTPUTS = torch.kron(_matrix(A_T), _matrix(A_T)).float()  # (16, 36)


@dataclass(frozen=True)
class Kernel:
    """G g Gᵀ, and what the products with it need."""

    values: Tensor  # (36, C, O)
    fewest: int  # rows


Kernels = Mapping[nn.Module, Kernel]

_made: WeakKeyDictionary[nn.Conv2d, tuple[Tensor, Kernel]] = WeakKeyDictionary()  # with a copy of the weight it is of


def kernels_of(module: nn.Module) -> Kernels:
    """Kernels for the convolutions of `module` that can go by tiles, for as long as their weights stay what they are.

    Empty where gradients or 16 bits are wanted, and elsewhere than on a CPU. Kernels are kept (SD 1.5: 0.8 GB), and
    made anew for a weight that holds other numbers than it did, whoever wrote them.
    """
    if module.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return {}
    found = {layer: _kernel(layer) for layer in module.modules() if isinstance(layer, nn.Conv2d) and _suits(layer)}
    return {layer: kernel for layer, kernel in found.items() if kernel is not None}


def convolved(layer: nn.Module, x: Tensor, kernels: Kernels | None) -> Tensor:
    """layer(x): by tiles where `kernels` has it and x (N, C, H, W) has whole tiles, N is even, fp32, channels-last."""
    kernel = None if kernels is None else kernels.get(layer)
    if kernel is None or x.dtype != torch.float32 or len(x) % 2 or x.shape[2] % TILE or x.shape[3] % TILE:
        return layer(x)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return layer(x)
    return _by_tiles(x, kernel, layer.bias)


def _suits(layer: nn.Conv2d) -> bool:
    weight, channels, out = layer.weight, layer.in_channels, layer.out_channels
    plain = layer.kernel_size == (3, 3) and layer.stride == layer.padding == layer.dilation == (1, 1)
    wide = min(channels, out) >= NARROW and PATCH**2 * channels * out * 4 <= LARGEST
    return plain and layer.groups == 1 and wide and weight.is_cpu and weight.dtype == torch.float32


def _kernel(layer: nn.Conv2d) -> Kernel | None:
    weight, channels, out = layer.weight.detach(), layer.in_channels, layer.out_channels
    fewest = _fewest(channels, out, torch.get_num_threads())
    if fewest is None:
        return None
    of, kernel = _made.get(layer, (None, None))
    if kernel is None or kernel.fewest != fewest or not torch.equal(of, weight):
        values = (KERNEL @ weight.double().flatten(2).permute(2, 1, 0).flatten(1)).float().view(PATCH**2, channels, out)
        kernel = Kernel(values, fewest)
        _made[layer] = weight.clone(), kernel
    return kernel


def _by_tiles(x: Tensor, kernel: Kernel, bias: Tensor) -> Tensor:  # (N, C, H, W) -> (N, O, H, W)
    images, channels, height, width = x.shape
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # (N, H+2, W+2, C)
    image, row, column, _ = x.stride()
    size = (PATCH, PATCH, images, height // TILE, width // TILE, channels)
    patches = x.as_strided(size, (row, column, image, TILE * row, TILE * column, 1))
    y = x.new_empty(images, height // TILE, TILE, width // TILE, TILE, len(bias))
    row_of_two = 2 * patches[:, :, 0, 0].numel() * 4  # bytes
    most = max(AT_ONCE, kernel.values.numel() * 4)
    rows = min(height // TILE, max(1, most // row_of_two))
    some = max(2, most // (rows * row_of_two) * 2)
    for few, outs in zip(patches.split(some, dim=2), y.split(some)):
        for part, out in zip(few.split(rows, dim=3), outs.split(rows, dim=1)):
            tiles = _product(part, kernel.values, kernel.fewest).view(TILE, TILE, *part.shape[2:5], -1)
            torch.add(tiles.permute(2, 3, 0, 4, 1, 5), bias, out=out)
    return y.view(images, height, width, -1).permute(0, 3, 1, 2)


def _product(patches: Tensor, kernel: Tensor, fewest: int) -> Tensor:
    """patches (6, 6, N, h, w, C), kernel (36, C, O) -> (16, T * O), the tiles' outputs; no product has fewer rows."""
    tiles, channels = patches[0, 0, ..., 0].numel(), patches.shape[-1]
    moved = (INPUTS @ patches.reshape(PATCH, -1)).view(PATCH, PATCH, -1)
    moved = torch.bmm(INPUTS.expand(PATCH, -1, -1), moved).view(PATCH**2, tiles, channels)
    if tiles < fewest:
        moved = F.pad(moved, (0, 0, 0, fewest - tiles))
    return OUTPUTS @ torch.bmm(moved, kernel)[:, :tiles].reshape(PATCH**2, -1)


@functools.cache
def _fewest(channels: int, out: int, threads: int) -> int | None:
    """Rows from which on a product's bits do not depend on their number, tried out on this CPU; None: not found.

    Libraries sum in another order where there are few, and which these are is theirs to choose. Tried with 2 to 64 rows
    against 130: about 3 ms for 192 channels.
    """
    source = torch.Generator().manual_seed(0)
    sizes = (PATCH, PATCH, 130, 1, 1, channels), (PATCH**2, channels, out)
    patches, kernel = (torch.randn(size, generator=source, dtype=torch.float32, device="cpu") for size in sizes)
    for fewest in (4, 8, 16, 32):
        whole = _product(patches, kernel, fewest)
        parts = (_product(patches[:, :, :n], kernel, fewest) for n in (2, 6, 8, 10, 18, 34, 64))
        if all(torch.equal(part, whole[:, : part.shape[1]]) for part in parts):
            return fewest
    return None
