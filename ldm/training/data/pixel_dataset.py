"""Batches of images that are not encoded, for a stage that trains an autoencoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.data.transforms import pixels
from ldm.errors import DataError
from ldm.training.data.dataset import ImageDataset
from ldm.training.data.encoded import Row
from ldm.training.data.epochs import Epochs
from ldm.training.data.live import Live
from ldm.training.distributed import RowShard, current


@dataclass(frozen=True)
class PixelBatch:
    """Samples of one size, not encoded."""

    pixels: Tensor  # uint8 (B, 3, H, W) on the CPU
    ids: list[str]
    part: RowShard
    weight: float = 1.0  # as a Batch's


class PixelEpochs(Epochs):
    """The images of a set by epochs, as pixels."""

    def pixels(self, number: int) -> tuple[list[Row], RowShard]:
        """As `rows`, with uint8 (3, H, W) in place of latents."""
        assert isinstance(self._latents, Live)
        for candidate in range(number, number + len(self)):
            views = self._views(candidate)[1]
            found, part = self._latents.pixel_rows(views, current().part(len(views)))
            if part.size:
                self._read_ahead(number + 1)
                return [Row(self.images.items[views[row][0]].id, values, "", ()) for row, values in found], part
        raise DataError("no image can be read any more", where=self.data.folder)

    def held_out_pixels(self, count: int) -> list[Tensor]:
        return [pixels(self.images.read(place)[0], view) for place, view in self._held_out()[:count]]


class PixelDataset(ImageDataset):
    """The images of a set, or drawn scenes, and their batches of pixels by number."""

    _epochs = PixelEpochs

    def pixel_batches(self, first_step: int, steps: int, accumulation: int) -> Iterator[PixelBatch]:
        """As `batches`, of `pixels`."""
        return self._of_steps(self.pixels, first_step, steps, accumulation)

    def pixels(self, number: int) -> PixelBatch:
        """The pixels of the number-th batch, of images that fill a square."""
        rows, part = self._reader.pixels(number)
        return PixelBatch(torch.stack([row.latents for row in rows]), [row.id for row in rows if part.weight], part)

    def held_out_pixels(self, count: int) -> list[Tensor]:
        """uint8 (3, H, W) of so many held-out images, or of all if there are fewer."""
        return self._reader.held_out_pixels(count)
