"""Datasets of other batches than latents and captions: pixels for an autoencoder, conditions for a ControlNet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.data.transforms import pixels
from ldm.errors import DataError
from ldm.training.data.conditions import Conditions, square_view
from ldm.training.data.dataset import ImageDataset
from ldm.training.data.encoded import Encoders, Memory, Row
from ldm.training.data.epochs import Epochs
from ldm.training.data.images import ImageSet
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


class ControlEpochs(Epochs):
    """The images of a set by epochs, with their conditions."""

    def __init__(self, images: ImageSet, encoders: Encoders | None, memory: Memory, *more: Any):
        super().__init__(images, encoders, memory, *more)
        self._condition = Conditions(images, memory if self.data.crop == "center" else None).of

    def examples(self, count: int) -> list[tuple[str, Tensor]]:
        """(caption, condition uint8 (C, H, W)) of square images, held-out ones first."""
        items, side = self.images.items, self.data.resolution
        places = [place for place, _ in self._held_out()]
        places = list(dict.fromkeys([*places, *self._places]))[:count]
        made = [(place, self._condition(place, square_view(items[place].size, side))) for place in places]
        return [((*items[place].captions, "")[0], control) for place, control in made if control is not None]


class ControlDataset(ImageDataset):
    """The images of a set, or drawn scenes, whose batches have conditions."""

    _epochs = ControlEpochs

    def examples(self, count: int) -> list[tuple[str, Tensor]]:
        """(caption, its condition in [0, 1] (3, H, W)) of so many squares, of held-out images where there are some."""
        return [(caption, made.expand(3, -1, -1) / 255) for caption, made in self._reader.examples(count)]
