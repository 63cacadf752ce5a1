"""The batches of a fine-tuning by number; every random draw is keyed by (seed, epoch, sample).

Shapes:  B samples of a batch   C, h, w latent channels, height, width
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import require
from ldm.console import say, warn
from ldm.data.buckets import Batches
from ldm.data.cache import Cache, CachedSample
from ldm.data.transforms import TransformConfig, View, choose_caption, draw_view, fixed_views, shuffle_tags
from ldm.errors import DataError, LdmError, NumericsError
from ldm.nn.text import Conditioning
from ldm.training.data.encoded import Cached, Encoders, Memory
from ldm.training.data.images import ImageSet
from ldm.training.data.live import Live
from ldm.training.distributed import RowShard, current, rows_of
from ldm.training.loop import seeded
from ldm.training.settings import OFF

Row = tuple[int, View, Tensor, str]  # place of an image, its view, latents drawn from their distribution, caption
EMBEDDED = ("states", "pooled", "mask")
CENTERED = TransformConfig()  # of images that are held out: cropped in the middle, never mirrored


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    latents: Tensor  # (B, C, h, w) fp32, scaled, on the device
    captions: list[str]  # one of the alternatives of each image, "" where it has none or it was dropped
    cond: Conditioning | None  # their embeddings in fp32; None where the dataset is made with texts=False
    time_ids: Tensor | None  # (B, 6) fp32, XL's original size, crop and target size; None without xl
    ids: list[str]  # of the samples, for messages
    part: RowShard  # which rows of the whole batch these are, where several processes share it
    prior: Batch | None = None  # of images of what the model is to keep, trained in the same step


class LatentDataset:
    """The images of a set, encoded, and their batches by number.

    Counts are printed before the first image is encoded. `out` is the run's folder, where the cache is unless the
    settings name another. With `texts` the batches carry the captions' embeddings, else the captions alone, for a text
    encoder that is trained; an empty caption is embedded as None, as guidance embeds it. With `xl` they carry sizes and
    crops. Raises DataError, ConfigError, ResourceError, Interrupted.
    """

    def __init__(
        self,
        images: ImageSet,
        encoders: Encoders,
        seed: int,
        batch_size: int,
        out: Path,
        texts: bool = True,
        xl: bool = False,
    ):
        data, step, factor = images.data, images.data.buckets.step, encoders.vae.factor
        require(step % factor == 0, f"{step} is not a multiple of the autoencoder's {factor}", "bucket_step")
        self.images, self.data, self.device, self.seed = images, data, encoders.device, seed
        self.batch_size, self.texts, self.xl = batch_size, texts, xl
        self.lines = images.lines
        say("\n".join(self.lines))
        self.lost: dict[str, LdmError] = {}  # images that became unreadable after they were counted, by id
        self._encoders, self._memory = encoders, Memory()
        self._cache: Cache | None = None
        if data.cache == OFF:
            memory = self._memory if data.crop == "center" else None
            self._latents = Live(images, encoders, memory, data.workers)
        else:
            self._latents = self._filled_cache(Path(data.cache or Path(out) / "cache"))
        self._places = images.trained
        if not self._places:
            raise DataError("no image is left to train on", where=data.folder)
        self._order = Batches([images.items[place].bucket for place in self._places], batch_size, seed)
        self._held_out = [i for i, item in enumerate(images.items) if item.digest in images.held_out]
        self._held_out.sort(key=lambda i: (images.items[i].bucket, images.items[i].digest))
        self.hash = images.hash

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    @property
    def samples(self) -> int:
        """Samples in an epoch, repeats counted."""
        return len(self._places)

    def batch(self, number: int) -> Batch:
        """The number-th batch since the beginning, always the same.

        Of several processes each gets its rows, and reads no other images; all have to ask for the same batch. The
        last batch of a bucket may be smaller. With `cache=off` an image that is gone or changed is left out with a
        warning, and an empty batch is replaced by the next one. Raises DataError where more images are lost than
        `max_bad` allows, or the cache was damaged since it was filled.
        """
        for candidate in range(number, number + len(self)):
            rows, part = self._rows(candidate)
            if part.size:
                if self._cache is None:
                    views = self._views(number + 1)
                    self._latents.expect([views[row][1:] for row in current().part(len(views)).own])
                return self._batch(rows, part)
        raise DataError("no image can be read any more", where=self.data.folder)

    def held_out(self) -> list[Batch]:
        """The batches of held-out images, always the same: the posterior's mean, the first caption, none dropped."""
        items, batches, rows = self.images.items, [], []
        for i in self._held_out:
            if rows and (len(rows) == self.batch_size or items[i].bucket != items[rows[-1][0]].bucket):
                batches.append(self._batch(rows, RowShard(len(rows))))
                rows = []
            (view,) = fixed_views(items[i].size, items[i].bucket, CENTERED)
            rows.append((i, view, self._latents.latents(i, view)[0], (*items[i].captions, "")[0]))
        return [*batches, self._batch(rows, RowShard(len(rows)))] if rows else batches

    def _filled_cache(self, folder: Path) -> Cached:
        """The cache with every entry that training needs; images that cannot be encoded are left out and counted."""
        images, encoders = self.images, self._encoders
        wanted = []
        for item in images.items:
            held = item.digest in images.held_out
            views = fixed_views(item.size, item.bucket, CENTERED if held else self.data.transform)
            wanted.append(CachedSample(item.id, item.digest, views, item.captions[:1] if held else item.captions))
        self._cache = cache = Cache(folder, encoders.vae_id, encoders.text_id, self.data.cache_dtype)

        def fill() -> dict[str, str]:
            with cache:
                embed = encoders.embed if self._caches_texts else None
                done = cache.prepare(wanted, images.read, encoders.encode, embed, self._lose_at)
            say(f"cache: {done.kept} entries found, {done.made} made, {done.bytes / 1e6:.1f} MB in {folder}")
            return {id: str(error) for id, error in self.lost.items()}

        lost = current().on_first(fill)
        self.lost = {id: self.lost.get(id) or DataError(text) for id, text in lost.items()}
        if not current().first:
            cache.reload()
        if self.lost:
            images.leave_out(self.lost)
            self.lines = images.lines
            say(f"{len(self.lost)} images cannot be encoded: {self.lines[1]}")
        return Cached(images, cache, self._memory)

    @property
    def _caches_texts(self) -> bool:
        """Whether the embeddings of all captions are in the cache."""
        return self.texts and self._cache is not None and not self.data.shuffle_tags

    def _lose_at(self, place: int, error: LdmError) -> None:
        self._lose(self.images.items[place].id, error)

    def _lose(self, id: str, error: LdmError) -> None:
        """Leave out an image that was counted as good. Raises DataError where too many are left out."""
        if id not in self.lost:
            warn(f"{error}; left out")
        self.lost[id] = error
        counts, allowed = self.images.source.counts, self.data.max_bad
        if len(counts.skipped) + len(self.lost) > (allowed * counts.found if allowed < 1 else allowed):
            self.images.leave_out(self.lost)  # raises, and names them

    def _views(self, number: int) -> list[tuple[int, int, View]]:
        """(position in the epoch, place of the image, its view) of each sample of a batch."""
        epoch, positions = self._order.at(number)
        views = []
        for position in positions:
            place = self._places[position]
            item = self.images.items[place]
            view = draw_view(item.size, item.bucket, self.data.transform, self.seed, epoch, position)
            views.append((position, place, view))
        return views

    def _rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which rows they are; an empty row where it has none."""
        views, epoch = self._views(number), number // len(self)
        part, rows, lost = current().part(len(views)), {}, {}
        if self._cache is None:
            self._latents.encode_together([views[row][1:] for row in part.own])
        for row in part.own:
            position, place, view = views[row]
            item = self.images.items[place]
            try:
                mean, std = self._latents.latents(place, view)
            except (DataError, NumericsError) as error:
                if self._cache is not None:
                    raise
                lost[row] = error
                continue
            latents = mean + std * seeded.normal(tuple(mean.shape), self.seed, "latents", epoch, position)
            caption = choose_caption(item.captions, self.data.caption_dropout, self.seed, epoch, position)
            if self.data.shuffle_tags:
                caption = shuffle_tags(caption, self.data.keep_tags, self.seed, epoch, position)
            rows[row] = (place, view, latents, caption)
        if self._cache is None:
            part = self._remaining(part, [self.images.items[place].id for _, place, _ in views], lost)
        if part.size and not rows:
            rows[0] = self._empty_row(*views[0][1:])
        return list(rows.values()), part

    def _remaining(self, part: RowShard, ids: Sequence[str], lost: Mapping[int, LdmError]) -> RowShard:
        """What is left of a part without the images (row -> error) that any process could not read."""
        group = current()
        gone = group.any_of([row in lost for row in range(len(ids))])
        if not any(gone):
            return part
        errors = group.gathered([json.dumps([row, str(error)]) for row, error in lost.items()])
        for row, text in sorted(map(json.loads, errors)):
            self._lose(ids[row], lost.get(row) or DataError(text))
        kept = [row for row, is_gone in enumerate(gone) if not is_gone]
        return rows_of(len(kept), [i for i, row in enumerate(kept) if row in part.own], group.world)

    def _empty_row(self, place: int, view: View) -> Row:
        """A row of the batch's size without an image, for a process that has none of its images."""
        vae = self._encoders.vae
        shape = (vae.latent_channels, view.size.height // vae.factor, view.size.width // vae.factor)
        return place, view, torch.zeros(shape), ""

    def _batch(self, rows: Sequence[Row], part: RowShard) -> Batch:
        captions = [caption for _, _, _, caption in rows]
        time_ids = torch.tensor([view.time_ids for _, view, _, _ in rows], dtype=torch.float32) if self.xl else None
        return Batch(
            torch.stack([latents for _, _, latents, _ in rows]).to(self.device),
            captions,
            self._embedded(captions) if self.texts else None,
            None if time_ids is None else time_ids.to(self.device),
            [self.images.items[place].id for place, _, _, _ in rows if part.weight],
            part,
        )

    def _embedded(self, captions: list[str]) -> Conditioning:
        shuffled = self._shuffled(captions) if self.data.shuffle_tags else {}
        rows = [shuffled.get(c) or self._memory.get(c, partial(self._embedding, c)) for c in captions]
        return Conditioning.cat([Conditioning(*row) for row in rows]).to(self.device, torch.float32)

    def _shuffled(self, captions: Sequence[str]) -> dict[str, tuple[Tensor | None, ...]]:
        """The embeddings of captions that do not come again in this order; of the empty caption none."""
        texts = list(dict.fromkeys(filter(None, captions)))
        if not texts:
            return {}
        tensors = self._encoders.embed(texts, together=True)
        parts = [tensors.get(name) for name in EMBEDDED]
        return {text: tuple(None if p is None else p[i : i + 1] for p in parts) for i, text in enumerate(texts)}

    def _embedding(self, caption: str) -> tuple[Tensor | None, ...]:
        """States (1, S, D), pooled (1, P) and mask (1, S) of a caption."""
        if self._caches_texts:
            tensors = {name: tensor[None] for name, tensor in self._cache.text(caption).items()}
        else:
            tensors = self._encoders.embed([caption])
        return tuple(tensors.get(name) for name in EMBEDDED)
