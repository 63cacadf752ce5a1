"""The batches of a fine-tuning by number; every random draw is keyed by (seed, epoch, sample).

Shapes:  B samples of a batch   C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import require
from ldm.console import say
from ldm.data.buckets import Batches
from ldm.data.transforms import View, choose_caption, draw_view, fixed_views, shuffle_tags
from ldm.errors import DataError
from ldm.nn.text import Conditioning
from ldm.training.data.cached import CENTERED, Cached
from ldm.training.data.encoded import EMBEDDED, Encoders, Memory
from ldm.training.data.images import ImageSet
from ldm.training.data.live import Live
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.settings import OFF

Row = tuple[int, View, Tensor, str]  # place of an image, its view, latents drawn from their distribution, caption


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    latents: Tensor  # (B, C, h, w) fp32, scaled, on the device
    captions: list[str]  # one of the alternatives of each image, "" where it has none or it was dropped
    cond: Conditioning | None  # their embeddings in fp32; None where the dataset is made with texts=False
    time_ids: Tensor | None  # (B, 6) fp32, XL's original size, crop and target size; None without xl
    ids: list[str]  # of the samples, for messages
    part: RowShard  # which rows of the whole batch these are, where several processes share it
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1], of what is learned; None: all of it
    prior: Batch | None = None  # of images of what the model is to keep, trained in the same step
    weight: float = 1.0  # of its mean loss in that of the step's batches, where these differ in size


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
        say("\n".join(images.lines))
        self._encoders, self._memory = encoders, Memory()
        self._caches_texts = texts and data.cache != OFF and not data.shuffle_tags
        self._latents: Cached | Live
        if data.cache == OFF:
            memory = self._memory if data.crop == "center" else None
            self._latents = Live(images, encoders, memory, data.workers)
        else:
            folder = Path(data.cache or Path(out) / "cache")
            self._latents = Cached(images, encoders, self._memory, folder, self._caches_texts)
        self.lines = images.lines
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
                if isinstance(self._latents, Live):
                    views = self._views(number + 1)[1]
                    self._latents.expect([views[row] for row in current().part(len(views)).own])
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

    def _views(self, number: int) -> tuple[list[int], list[tuple[int, View]]]:
        """The positions of a batch's samples in the epoch, and (place of the image, its view) of each."""
        epoch, positions = self._order.at(number)
        views = []
        for position in positions:
            item = self.images.items[place := self._places[position]]
            view = draw_view(item.size, item.bucket, self.data.transform, self.seed, epoch, position)
            views.append((place, view))
        return positions, views

    def _rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which rows they are; one that does not count where it has none."""
        (positions, views), epoch, rows = self._views(number), number // len(self), []
        found, part = self._latents.rows(views, current().part(len(views)))
        for row, mean, std in found:
            place, view = views[row]
            position, item = positions[row], self.images.items[place]
            latents = mean + std * seeded.normal(tuple(mean.shape), self.seed, "latents", epoch, position)
            caption = choose_caption(item.captions, self.data.caption_dropout, self.seed, epoch, position)
            if self.data.shuffle_tags:
                caption = shuffle_tags(caption, self.data.keep_tags, self.seed, epoch, position)
            rows.append((place, view, latents, caption))
        return rows, part

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
        # captions in an order that does not come again are embedded together, and not kept
        shuffled = self._encoders.embed_rows(captions) if self.data.shuffle_tags else {}
        rows = [shuffled.get(c) or self._memory.get(c, partial(self._embedding, c)) for c in captions]
        return Conditioning.cat([Conditioning(*row) for row in rows]).to(self.device, torch.float32)

    def _embedding(self, caption: str) -> tuple[Tensor | None, ...]:
        """States (1, S, D), pooled (1, P) and mask (1, S) of a caption."""
        if self._caches_texts:
            tensors = {name: tensor[None] for name, tensor in self._latents.cache.text(caption).items()}
        else:
            tensors = self._encoders.embed([caption])
        return tuple(tensors.get(name) for name in EMBEDDED)
