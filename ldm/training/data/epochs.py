"""The images of a set by epochs, from a cache on the disk; every random draw is keyed by (seed, epoch, sample).

Shapes:  C, h, w latent channels, height, width   H, W image size
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ldm.config import require
from ldm.console import say
from ldm.data.buckets import Batches
from ldm.data.cache import Cache, CachedSample
from ldm.data.transforms import TransformConfig, View, choose_caption, draw_view, fixed_views, shuffle_tags
from ldm.errors import DataError
from ldm.files import format_bytes
from ldm.training.data.encoded import Embedding, Encoders, Memory, Row, embed_rows, nothing
from ldm.training.data.images import ImageSet
from ldm.training.data.live import Live, leave_out, lose
from ldm.training.data.masks import Masks
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.settings import OFF

CENTERED = TransformConfig()  # of images that are held out: cropped in the middle, never mirrored


class Epochs:
    """Each image of a set as often in an epoch as it repeats, in batches of one bucket each; see `ImageDataset`."""

    def __init__(
        self,
        images: ImageSet,
        encoders: Encoders | None,
        memory: Memory,
        seed: int,
        batch_size: int,
        out: Path,
        texts: bool,
    ):
        self.images, self.data, self.seed, self.batch_size = images, images.data, seed, batch_size
        self._encoders, self._latents = encoders, self._opened(encoders, memory, out, texts)
        self._condition: Callable[[int, View], Tensor | None] = nothing  # what a ControlNet sees
        self._places = images.trained
        if not self._places:
            raise DataError("no image is left to train on", where=self.data.folder)
        self._order = Batches([images.items[place].bucket for place in self._places], batch_size, seed)

    def _opened(self, encoders: Encoders | None, memory: Memory, out: Path, texts: bool) -> Cached | Live:
        images, data = self.images, self.data
        if encoders is None:
            return Live(images, None, None, data.workers)
        step, factor = data.buckets.step, encoders.vae.factor
        require(step % factor == 0, f"{step} is not a multiple of the autoencoder's {factor}", "bucket_step")
        if data.cache == OFF:
            return Live(images, encoders, memory if data.crop == "center" else None, data.workers)
        return Cached(images, encoders, memory, Path(data.cache or out / "cache"), texts and not data.shuffle_tags)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def samples(self) -> int:
        return len(self._places)

    def rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which rows they are; one that does not count where it has none."""
        for candidate in range(number, number + len(self)):
            rows, part = self._rows(candidate)
            if part.size:
                self._read_ahead(number + 1)
                return rows, part
        raise DataError("no image can be read any more", where=self.data.folder)

    def _rows(self, number: int) -> tuple[list[Row], RowShard]:
        (positions, views), epoch, rows = self._views(number), number // len(self), []
        found, part = self._latents.rows(views, current().part(len(views)))
        for row, mean, std, mask in found:
            place, view = views[row]
            position, item = positions[row], self.images.items[place]
            latents = mean + std * seeded.normal(tuple(mean.shape), self.seed, "latents", epoch, position)
            caption = choose_caption(item.captions, self.data.caption_dropout, self.seed, epoch, position)
            if self.data.shuffle_tags:
                caption = shuffle_tags(caption, self.data.keep_tags, self.seed, epoch, position)
            rows.append(Row(item.id, latents, caption, view.time_ids, mask, self._condition(place, view)))
        return rows, part

    def _views(self, number: int) -> tuple[list[int], list[tuple[int, View]]]:
        """The positions of a batch's samples in the epoch, and (place of the image, its view) of each."""
        epoch, positions = self._order.at(number)
        views = []
        for position in positions:
            item = self.images.items[place := self._places[position]]
            view = draw_view(item.size, item.bucket, self.data.transform, self.seed, epoch, position)
            views.append((place, view))
        return positions, views

    def _read_ahead(self, number: int) -> None:
        if isinstance(self._latents, Live):
            views = self._views(number)[1]
            self._latents.expect([views[row] for row in current().part(len(views)).own])

    def held_out(self) -> list[list[Row]]:
        """Batches of the held-out images: the posterior's mean, the first caption, cropped in the middle."""
        batches: list[list[Row]] = []
        last = None
        for place, view in self._held_out():
            item = self.images.items[place]
            latents, mask = self._latents.latents(place, view)[0], self._latents.mask(place, view)
            row = Row(item.id, latents, (*item.captions, "")[0], view.time_ids, mask, self._condition(place, view))
            if item.bucket != last or len(batches[-1]) == self.batch_size:
                batches.append([])
            batches[-1].append(row)
            last = item.bucket
        return batches

    def _held_out(self) -> list[tuple[int, View]]:
        items, held = self.images.items, self.images.held_out
        places = [place for place, item in enumerate(items) if item.digest in held]
        places.sort(key=lambda place: (items[place].bucket, items[place].digest))
        return [(place, *fixed_views(items[place].size, items[place].bucket, CENTERED)) for place in places]

    def captions(self, count: int | None) -> list[str]:
        if count is None:
            return [caption for item in self.images.items for caption in item.captions]
        return [item.captions[0] for item in self.images.items[:count] if item.captions]

    def embedded(self, captions: Sequence[str]) -> Mapping[str, Embedding]:
        """Captions in an order that does not come again are embedded together, and not kept."""
        return embed_rows(self._encoders, captions) if self._encoders and self.data.shuffle_tags else {}

    def embedding(self, caption: str) -> dict[str, Tensor]:
        if isinstance(self._latents, Cached) and self._latents.texts:
            return {name: tensor[None] for name, tensor in self._latents.cache.text(caption).items()}
        assert self._encoders is not None
        return self._encoders.embed([caption])

    def close(self) -> None:
        """Nothing outlives the process: images are read by threads."""


class Cached:
    """A cache with every entry that training needs; images that cannot be encoded are left out and counted.

    With `texts` it has the captions' embeddings too. Raises DataError, ResourceError, Interrupted.
    """

    def __init__(self, images: ImageSet, encoders: Encoders, memory: Memory, folder: Path, texts: bool):
        self.images, self.memory, self.texts = images, memory, texts
        self.mask = Masks(images, encoders.vae.factor, memory).of if images.data.masks else nothing
        wanted = []
        for item in images.items:
            held = item.digest in images.held_out
            views = fixed_views(item.size, item.bucket, CENTERED if held else images.data.transform)
            wanted.append(CachedSample(item.id, item.digest, views, item.captions[:1] if held else item.captions))
        self.cache = cache = Cache(folder, encoders.vae_id, encoders.text_id, images.data.cache_dtype)

        def fill() -> dict[str, str]:
            with cache:
                embed = encoders.embed if texts else None
                done = cache.prepare(wanted, images.read, encoders.encode, embed, partial(lose, images))
            say(f"cache: {done.kept} entries found, {done.made} made, {format_bytes(done.bytes)} in {folder}")
            return {id: str(error) for id, error in images.lost.items()}

        lost = current().on_first(fill)
        images.lost = {id: images.lost.get(id) or DataError(text) for id, text in lost.items()}
        if not current().first:
            cache.reload()
        if images.lost:
            leave_out(images, images.lost)
            say(f"{len(images.lost)} images cannot be encoded: {images.lines[1]}")

    def rows(self, views: Sequence[tuple[int, View]], part: RowShard) -> tuple[list[tuple], RowShard]:
        """(row, mean, std, mask) of this process's rows of a batch, and which rows they are.

        Mean and std are fp32 (C, h, w), the mask (1, h, w) or None.
        """
        return [(row, *self.latents(*views[row]), self.mask(*views[row])) for row in part.own or (0,)], part

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        """Mean and std. Raises DataError where the cache was damaged since it was filled."""
        digest = self.images.items[place].digest
        return self.memory.get((digest, view), lambda: self.cache.latents(digest, view))
