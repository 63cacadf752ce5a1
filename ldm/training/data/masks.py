"""What is learned of images: masks of their views, in memory as far as it reaches.

Shapes:  h, w latent height, width
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.data.transforms import View
from ldm.training.data.encoded import Memory
from ldm.training.data.images import ImageSet


class Masks:
    """How much each latent of a view is learned; `memory` is None where no view comes again."""

    def __init__(self, images: ImageSet, factor: int, memory: Memory | None):
        self.images, self.factor, self.memory = images, factor, memory

    def of(self, place: int, view: View) -> Tensor | None:
        """(1, h, w) in [0, 1], 1 everywhere of an image without a mask; None where no masks are asked for.

        Raises DataError where the mask is gone or was changed.
        """
        if not self.images.data.masks:
            return None
        mask = self._read(place, view)
        if mask is None:
            return torch.ones(1, view.size.height // self.factor, view.size.width // self.factor)
        return mask.float() / 255

    def _read(self, place: int, view: View) -> Tensor | None:
        if self.memory is None:
            return self.images.mask(place, view, self.factor)
        key = (self.images.items[place].pixels, "mask", view)
        return self.memory.get(key, lambda: (self.images.mask(place, view, self.factor),))[0]
