"""What is learned of images: masks of their views, in memory as far as it reaches.

Shapes:  h, w latent height, width
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.data.images import MAX_FILE
from ldm.data.masks import ALPHA, read_mask
from ldm.data.transforms import View
from ldm.errors import DataError
from ldm.training.data.encoded import Memory
from ldm.training.data.images import ImageSet


class Masks:
    """How much each latent of a view is learned; `memory` is None where no view comes again."""

    def __init__(self, images: ImageSet, factor: int, memory: Memory | None):
        self.images, self.factor, self.memory = images, factor, memory

    def of(self, place: int, view: View) -> Tensor:
        """(1, h, w) in [0, 1], 1 everywhere of an image without a mask.

        Raises DataError where the mask is gone or was changed.
        """
        mask = self._read(place, view)
        if mask is None:
            return torch.ones(1, view.size.height // self.factor, view.size.width // self.factor)
        return mask.float() / 255

    def _read(self, place: int, view: View) -> Tensor | None:
        if self.memory is None:
            return self._made(place, view)
        key = (self.images.items[place].pixels, "mask", view)
        return self.memory.get(key, lambda: (self._made(place, view),))[0]

    def _made(self, place: int, view: View) -> Tensor | None:
        """uint8 (1, h, w); None of an image without a mask."""
        images, item = self.images, self.images.items[place]
        if not item.mask:
            return None
        with images.reading:
            sample, content = images.source[place], b""
            if item.mask == ALPHA:
                with sample.open() as file:
                    content = file.read(MAX_FILE + 1)
        mask, kind = read_mask(content, sample, view, self.factor)
        if kind != item.mask:
            raise DataError("its mask was changed since the training began", where=f"{images.source.path}/{item.id}")
        return mask
