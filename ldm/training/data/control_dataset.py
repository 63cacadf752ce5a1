"""Batches of images with what a ControlNet sees of each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ldm.training.data.conditions import Conditions, square_view
from ldm.training.data.dataset import ImageDataset
from ldm.training.data.encoded import Encoders, Memory
from ldm.training.data.epochs import Epochs
from ldm.training.data.images import ImageSet


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
