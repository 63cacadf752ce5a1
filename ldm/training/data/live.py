"""Latents of images that are read and encoded when they are needed.

Shapes:  C, h, w latent channels, height, width
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ldm.console import warn
from ldm.data.sources import Sample
from ldm.data.transforms import View, pixels, to_float
from ldm.errors import DataError, LdmError, NumericsError
from ldm.training.data.encoded import Encoders, Memory, nothing
from ldm.training.data.images import ImageSet
from ldm.training.data.masks import Masks
from ldm.training.distributed import RowShard, current, rows_of

ENCODED_AT_ONCE = 8 * 3 * 256 * 256  # numbers of the images that the autoencoder encodes in one call


class Live:
    """Latents of images that are read and encoded when they are needed; threads read the next ones ahead."""

    def __init__(self, images: ImageSet, encoders: Encoders | None, memory: Memory | None, workers: int):
        self.images, self.encoders, self.memory = images, encoders, memory  # no memory where no view comes again
        factor = encoders.vae.factor if encoders is not None else 1
        self.mask = Masks(images, factor, memory).of if images.data.masks else nothing
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

    def rows(self, views: Sequence[tuple[int, View]], part: RowShard) -> tuple[list[tuple], RowShard]:
        """(row, mean, std, mask) of this process's rows of a batch, and which rows they are.

        Mean and std are fp32 (C, h, w), the mask (1, h, w) or None.
        Images that any process cannot read are left out with a warning; a process that has none of the others gets a
        row without an image. Raises DataError where more images are lost than `max_bad` allows.
        """
        self._encode_together([views[row] for row in part.own])
        read = lambda place, view: (*self.latents(place, view), self.mask(place, view))  # noqa: E731
        found, part = self._read_rows(views, part, read)
        if part.size and not found:
            vae, size = self.encoders.vae, views[0][1].size
            nothing = torch.zeros(vae.latent_channels, size.height // vae.factor, size.width // vae.factor)
            found = [(0, nothing, nothing, torch.zeros_like(nothing[:1]) if self.images.data.masks else None)]
        return found, part

    def pixel_rows(self, views: Sequence[tuple[int, View]], part: RowShard) -> tuple[list[tuple], RowShard]:
        """As `rows`, with (row, uint8 (3, H, W))."""
        found, part = self._read_rows(views, part, lambda place, view: (self._read(place, view),))
        if part.size and not found:
            found = [(0, torch.zeros(3, *views[0][1].size, dtype=torch.uint8))]
        return found, part

    def _read_rows(
        self, views: Sequence[tuple[int, View]], part: RowShard, read: Callable[[int, View], tuple[Tensor, ...]]
    ) -> tuple[list[tuple], RowShard]:
        found, lost = [], {}
        for row in part.own:
            try:
                found.append((row, *read(*views[row])))
            except (DataError, NumericsError) as error:
                lost[row] = error
        return found, self._remaining(part, [place for place, _ in views], lost)

    def _remaining(self, part: RowShard, places: Sequence[int], lost: Mapping[int, LdmError]) -> RowShard:
        """What is left of a part without the images (row -> error) that any process could not read."""
        group = current()
        gone = group.any_of([row in lost for row in range(len(places))])
        if not any(gone):
            return part
        errors = group.gathered([json.dumps([row, str(error)]) for row, error in lost.items()])
        for row, text in sorted(map(json.loads, errors)):
            lose(self.images, places[row], lost.get(row) or DataError(text))
        kept = [row for row, is_gone in enumerate(gone) if not is_gone]
        return rows_of(len(kept), [i for i, row in enumerate(kept) if row in part.own], group.world)

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        """Raises ImageError where the image is gone, DataError where it was changed, NumericsError."""
        if self.memory is None:
            return self._encoded.get((place, view)) or self._encode(place, view)
        return self.memory.get((self.images.items[place].digest, view), lambda: self._encode(place, view))

    def _encode_together(self, views: Sequence[tuple[int, View]]) -> None:
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


def lose(images: ImageSet, place: int, error: LdmError) -> None:
    """Leave out an image that was counted as good. Raises DataError where too many are left out."""
    id, counts, allowed = images.items[place].id, images.source.counts, images.data.max_bad
    if id not in images.lost:
        warn(f"{error}; left out")
    images.lost[id] = error
    if counts.lost().total() + len(images.lost) > (allowed * counts.found if allowed < 1 else allowed):
        leave_out(images, images.lost)  # raises, and names them


def leave_out(images: ImageSet, bad: Mapping[str, LdmError]) -> None:
    """Count these images, by id, as skipped. Raises DataError where they are more than `max_bad` allows."""

    def check(sample: Sample) -> None:
        if error := bad.get(sample.id):
            raise error if isinstance(error, DataError) else DataError(error.what)

    for _ in images.source.validate(check, desc="leaving out"):
        pass
    images.items = [item for item in images.items if item.id not in bad]
    images.held_out &= {item.digest for item in images.items}
    images.require()
