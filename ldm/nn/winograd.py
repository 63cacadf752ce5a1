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
import threading
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

TILE, PATCH = 4, 6  # sides of a tile of outputs, and of the inputs that it is made of
NARROW = 64  # channels, in or out, below which there is nothing to gain
LARGEST = 64 << 20  # bytes of a transformed kernel; larger ones are for small images, and would fill the memory
AT_ONCE = 4 << 20  # bytes of transformed inputs, or as many as the kernel has: for the caches, and for the allocator

Rows = tuple[tuple[float, ...], ...]
B_T: Rows = ((1, -3 / 2, -2, 3 / 2, 1, 0), (0, -1, 1 / 2, 5 / 2, 1, 0), (0, 1, -5 / 2, 1 / 2, 1, 0))
B_T += ((0, -2, -1, 2, 1, 0), (0, 1 / 2, -1, -1 / 2, 1, 0), (0, 1, -3 / 2, -2, 3 / 2, 1))
G: Rows = ((1, 0, 0), (1 / 3, 1 / 3, 1 / 3), (-1 / 3, 1 / 3, -1 / 3), (-16 / 15, -8 / 15, -4 / 15))
G += ((1 / 15, -2 / 15, 4 / 15), (0, 0, 1))
A_T: Rows = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 1 / 2, -2, 0), (0, 1, 1, 1 / 4, 4, 0), (0, 1, -1, 1 / 8, -8, 1))


def _matrix(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


INPUTS = _matrix(B_T).float()  # (6, 6), for one direction at a time
KERNEL = torch.kron(_matrix(G), _matrix(G))  # (36, 9), for both directions
OUTPUTS = torch.kron(_matrix(A_T), _matrix(A_T)).float()  # (16, 36)


RUN = threading.local()  # .tiles: whether this thread's call of the network is a step of a prepared run


@dataclass(frozen=True)
class Kernel:
    """G g Gᵀ of a weight g, and what the products with it need."""

    values: Tensor  # (36, C, O)
    fewest: int  # rows
    weight: Tensor  # a copy of g

    def __deepcopy__(self, memo: dict[int, object]) -> Kernel:
        return self


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution that keeps the size; it goes by tiles where `refresh` has found that this CPU can.

    The transformed kernel (SD 1.5: 0.8 GB for all of them) is used in eval mode without gradients, for channels-last
    fp32 inputs of an even number of images in whole tiles, in calls that belong to a prepared run (see RUN), and until
    something writes to the weight.
    """

    bias: Tensor

    def __init__(self, channels: int, out: int):
        super().__init__(channels, out, 3, padding=1)
        self.kernel: Kernel | None = None
        self._made_of: tuple[Tensor | None, int] = None, 0  # the weight and its version at the last `refresh`

    def refresh(self) -> None:
        """Make the transformed kernel anew if the weight holds other numbers than before, whoever wrote them."""
        fewest = _fewest(self.in_channels, self.out_channels, torch.get_num_threads()) if self._suits() else None
        if fewest is None:
            self.kernel, self._made_of = None, (None, 0)
            return
        weight, kernel = self.weight.detach(), self.kernel
        if kernel is None or kernel.fewest != fewest or not torch.equal(kernel.weight, weight):
            self.kernel = Kernel(_transformed(weight), fewest, weight.clone())
        self._made_of = self.weight, _version(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, O, H, W)
        if self.kernel is None or is_compiling():
            return super().forward(x)
        tiles = getattr(RUN, "tiles", False) and self._fresh() and _whole_tiles(x)
        return _by_tiles(x, self.kernel, self.bias) if tiles else super().forward(x)

    def _suits(self) -> bool:
        weight, channels, out = self.weight, self.in_channels, self.out_channels
        wide = min(channels, out) >= NARROW and PATCH**2 * channels * out * 4 <= LARGEST
        return wide and weight.is_cpu and weight.dtype == torch.float32 and self._draws()

    def _draws(self) -> bool:
        """Neither trained nor in 16 bits."""
        return not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))

    def _fresh(self) -> bool:
        """Whether the kernel may be used: the weight is still what it was made of."""
        return self._draws() and self._made_of[0] is self.weight and self._made_of[1] == _version(self.weight)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _whole_tiles(x: Tensor) -> bool:
    whole = not (x.dtype != torch.float32 or len(x) % 2 or x.shape[2] % TILE or x.shape[3] % TILE)
    return whole and x.is_contiguous(memory_format=torch.channels_last)


def _transformed(weight: Tensor) -> Tensor:  # (O, C, 3, 3) -> (36, C, O)
    out, channels = weight.shape[:2]
    kernel = KERNEL @ weight.double().flatten(2).permute(2, 1, 0).flatten(1)
    return kernel.float().view(PATCH**2, channels, out)


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


# Libraries sum in another order where there are few rows, and which these are is theirs to choose. Tried with 2 to 64
# rows against 130: about 3 ms for 192 channels.
@functools.cache
def _fewest(channels: int, out: int, threads: int) -> int | None:
    """Rows from which on a product's bits do not depend on their number, tried out on this CPU; None: not found."""
    source = torch.Generator().manual_seed(0)
    sizes = (PATCH, PATCH, 130, 1, 1, channels), (PATCH**2, channels, out)
    patches, kernel = (torch.randn(size, generator=source, dtype=torch.float32, device="cpu") for size in sizes)
    for fewest in (4, 8, 16, 32):
        whole = _product(patches, kernel, fewest)
        parts = (_product(patches[:, :, :n], kernel, fewest) for n in (2, 6, 8, 10, 18, 34, 64))
        if all(torch.equal(part, whole[:, : part.shape[1]]) for part in parts):
            return fewest
    return None
