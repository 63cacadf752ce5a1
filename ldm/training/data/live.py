"""Latents of images that are read and encoded when they are needed.

Shapes:  C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ldm.data.transforms import View, pixels, to_float
from ldm.errors import DataError, NumericsError
from ldm.training.data.encoded import Encoders, Memory
from ldm.training.data.images import ImageSet

ENCODED_AT_ONCE = 8 * 3 * 256 * 256  # numbers of the images that the autoencoder encodes in one call


class Live:
    """Latents of images that are read and encoded when they are needed; threads read the next ones ahead."""

    def __init__(self, images: ImageSet, encoders: Encoders, memory: Memory | None, workers: int):
        self.images, self.encoders, self.memory = images, encoders, memory  # no memory where no view comes again
        self.threads = ThreadPoolExecutor(workers, "images") if workers else None
        self._coming: dict[tuple[int, View], Future[Tensor]] = {}
        self._encoded: dict[tuple[int, View], tuple[Tensor, Tensor]] = {}  # those of this batch

    def expect(self, views: Sequence[tuple[int, View]]) -> None:
        """Read these ahead, and drop what was read ahead before and is not among them."""
        if self.threads is None:
            return
        wanted = [(place, view) for place, view in views if not self._kept(place, view)]
        for key in self._coming.keys() - set(wanted):
            self._coming.pop(key).cancel()
        for key in wanted:
            if key not in self._coming:
                self._coming[key] = self.threads.submit(self._pixels, *key)

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        """Raises ImageError where the image is gone, DataError where it was changed, NumericsError."""
        if self.memory is None:
            return self._encoded.get((place, view)) or self._encode(place, view)
        return self.memory.get((self.images.items[place].digest, view), lambda: self._encode(place, view))

    def encode_together(self, views: Sequence[tuple[int, View]]) -> None:
        """Encode images of one size at once, which is faster, where no memory keeps them.

        Where one of them fails they are left to be encoded one by one.
        """
        self._encoded.clear()
        if self.memory is not None or len(views) < 2:
            return
        views = list(dict.fromkeys(views))
        try:
            values = torch.stack([self._read(*key) for key in views])
            parts = values.split(max(1, ENCODED_AT_ONCE // values[0].numel()))
            means, stds = zip(*(self.encoders.encode(to_float(part)) for part in parts))
        except (DataError, NumericsError):
            return
        self._encoded = dict(zip(views, zip(torch.cat(means), torch.cat(stds))))

    def _kept(self, place: int, view: View) -> bool:
        return self.memory is not None and (self.images.items[place].digest, view) in self.memory

    def _encode(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        mean, std = self.encoders.encode(to_float(self._read(place, view))[None])
        return mean[0], std[0]

    def _read(self, place: int, view: View) -> Tensor:
        coming = self._coming.pop((place, view), None)
        return coming.result() if coming else self._pixels(place, view)

    def _pixels(self, place: int, view: View) -> Tensor:
        image, digest = self.images.read(place)
        item = self.images.items[place]
        if digest != item.digest:
            raise DataError("was changed since the training began", where=f"{self.images.source.path}/{item.id}")
        return pixels(image, view)
