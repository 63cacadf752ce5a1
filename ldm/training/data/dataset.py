"""Batches of a fine-tuning by number, every draw keyed by (seed, epoch, sample).

Shapes:  B samples of a batch   C, h, w latent channels, height, width
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.config import require
from ldm.console import say, warn
from ldm.data.buckets import Batches
from ldm.data.transforms import TransformConfig, View, choose_caption, draw_view, fixed_views, shuffle_tags
from ldm.errors import DataError, LdmError, NumericsError
from ldm.training.data.images import Pictures, read_pictures
from ldm.training.data.settings import OFF, FinetuneData
from ldm.training.distributed import RowShard, current, rows_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.data.cache import Cache
    from ldm.nn.text import Conditioning, TextEncoder
    from ldm.nn.vae import VAE
    from ldm.training.data.encoded import Cached

Row = tuple[int, View, "Tensor", str]  # place of a picture, its view, latents drawn from their distribution, caption
EMBEDDED = ("states", "pooled", "mask")
STILL = TransformConfig()  # of pictures that are held out: cropped in the middle, never mirrored


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    latents: Tensor  # (B, C, h, w) fp32, scaled, on the device
    captions: list[str]  # as they are trained: one of the alternatives, "" where there is none or it was dropped
    cond: Conditioning | None  # their embeddings in fp32; None where the dataset was made with texts=False
    time_ids: Tensor | None  # (B, 6) fp32, XL's original size, crop and target size; None without xl
    ids: list[str]  # of the samples, for messages
    part: RowShard  # which rows of the whole batch these are, where several processes share it
    prior: Batch | None = None  # what is kept of what the model knows, to be learned in the same step


class Dataset:
    """A set that was opened, judged, counted and encoded, and its batches by number.

    Everything that is wrong with the data is said before a network runs; the counts are said before the first picture
    is encoded. `ids` name the autoencoder and the text encoder (sha256 of the weights). With `texts` the batches carry
    the captions' embeddings, else the captions alone, for a text encoder that is trained. `out` is the run's folder,
    `pictures` what `read_pictures` found, where that was asked before. An empty caption is embedded as None, which is
    what stands on guidance's other side. Raises DataError, ConfigError, ResourceError, Interrupted.
    """

    def __init__(
        self,
        data: FinetuneData,
        vae: VAE,
        text: TextEncoder,
        ids: tuple[str, str],
        device: torch.device,
        seed: int,
        batch_size: int,
        out: Path,
        texts: bool = True,
        xl: bool = False,
        pictures: Pictures | None = None,
    ):
        from ldm.training.data.encoded import Encoders, Live, Memory

        step = data.buckets.step
        require(step % vae.factor == 0, f"{step} is not a multiple of the autoencoder's {vae.factor}", "bucket_step")
        self.pictures = pictures = pictures or read_pictures(data, text.truncated)
        self.data, self.device, self.seed, self.texts, self.xl = data, device, seed, texts, xl
        self.lines = pictures.lines
        say("\n".join(self.lines))
        self.lost: dict[str, LdmError] = {}  # pictures that went bad after they had been counted, by id
        self._encoders, self._memory = Encoders(vae, text, ids, device), Memory()
        self._cache: Cache | None = None
        if data.cache == OFF:
            again = self._memory if data.crop == "center" else None
            self._latents = Live(pictures, self._encoders, again, data.workers)
        else:
            self._latents = self._prepared(Path(data.cache or Path(out) / "cache"))
        self._places = pictures.trained
        if not self._places:
            raise DataError("no picture is left to train on", where=data.folder)
        self._order = Batches([pictures.items[place].bucket for place in self._places], batch_size, seed)
        self._held_out = [i for i, item in enumerate(pictures.items) if item.digest in pictures.held_out]
        self._held_out.sort(key=lambda i: (pictures.items[i].bucket, pictures.items[i].digest))
        self.batch_size, self.hash = batch_size, pictures.hash

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._order)

    @property
    def samples(self) -> int:
        """Samples in an epoch, repeats counted."""
        return len(self._places)

    def batch(self, number: int) -> Batch:
        """The number-th batch since the beginning: the same whenever, and however often, it is asked for.

        Of many processes each gets its rows of it, and reads no other pictures; all have to ask for the same one.
        What is left of a bucket makes a smaller one. With `cache=off` a picture that is gone or changed by now is left
        out with a warning, and a batch of which nothing is left is the next one. Raises DataError where more are lost
        than `max_bad` allows, or the cache was damaged since it was prepared.
        """
        for candidate in range(number, number + len(self)):
            rows, part = self._rows(candidate)
            if part.size:
                if self._cache is None:
                    views = self._views(number + 1)
                    self._latents.expect([views[row][1:] for row in current().part(len(views)).own])
                return self._batch(rows, part)
        raise DataError("not one picture can be read any more", where=self.data.folder)

    def held_out(self) -> list[Batch]:
        """The pictures kept for validation, always the same: the posterior's mean, the first caption, none dropped."""
        items, batches, rows = self.pictures.items, [], []
        for i in self._held_out:
            if rows and (len(rows) == self.batch_size or items[i].bucket != items[rows[-1][0]].bucket):
                batches.append(self._batch(rows, RowShard(len(rows))))
                rows = []
            (view,) = fixed_views(items[i].size, items[i].bucket, STILL)
            rows.append((i, view, self._latents.latents(i, view)[0], (*items[i].captions, "")[0]))
        return [*batches, self._batch(rows, RowShard(len(rows)))] if rows else batches

    def _prepared(self, folder: Path) -> Cached:
        """Every entry that training will ask for, made or found sound; bad pictures are left out and counted."""
        from ldm.data.cache import Cache, CachedSample
        from ldm.training.data.encoded import Cached

        pictures, encoders = self.pictures, self._encoders
        wanted = []
        for item in pictures.items:
            held = item.digest in pictures.held_out
            views = fixed_views(item.size, item.bucket, STILL if held else self.data.transform)
            wanted.append(CachedSample(item.id, item.digest, views, item.captions[:1] if held else item.captions))
        self._cache = cache = Cache(folder, encoders.vae_id, encoders.text_id, self.data.cache_dtype)

        def prepare() -> dict[str, str]:
            with cache:
                embed = encoders.embed if self._texts_kept else None
                found = cache.prepare(wanted, pictures.read, encoders.encode, embed, self._lose_at)
            say(f"cache: {found.kept} entries found, {found.made} made, {found.bytes / 1e6:.1f} MB in {folder}")
            return {id: str(error) for id, error in self.lost.items()}

        lost = current().on_first(prepare)
        self.lost = {id: self.lost.get(id) or DataError(text) for id, text in lost.items()}
        if not current().first:
            cache.reload()
        if self.lost:
            pictures.leave_out(self.lost)
            self.lines = pictures.lines
            say(f"{len(self.lost)} pictures cannot be encoded: {self.lines[1]}")
        return Cached(pictures, cache, self._memory)

    @property
    def _texts_kept(self) -> bool:
        """Whether the embeddings of all captions are in the cache."""
        return self.texts and self._cache is not None and not self.data.shuffle_tags

    def _lose_at(self, place: int, error: LdmError) -> None:
        self._lose(self.pictures.items[place].id, error)

    def _lose(self, id: str, error: LdmError) -> None:
        """Go on without a picture that was counted as good. Raises DataError where they become too many."""
        if id not in self.lost:
            warn(f"{error}; left out")
        self.lost[id] = error
        counts, allowed = self.pictures.source.counts, self.data.max_bad
        if len(counts.skipped) + len(self.lost) > (allowed * counts.found if allowed < 1 else allowed):
            self.pictures.leave_out(self.lost)  # says which, and raises

    def _views(self, number: int) -> list[tuple[int, int, View]]:
        """(position in the epoch, place of the picture, its view) of each sample of a batch."""
        epoch, positions = self._order.at(number)
        found = []
        for position in positions:
            place = self._places[position]
            item = self.pictures.items[place]
            view = draw_view(item.size, item.bucket, self.data.transform, self.seed, epoch, position)
            found.append((position, place, view))
        return found

    def _rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which they are: of a batch in which it has none, an empty one."""
        from ldm.training.loop import seeded

        views, epoch = self._views(number), number // len(self)
        part, rows, lost = current().part(len(views)), {}, {}
        if self._cache is None:
            self._latents.encode_together([views[row][1:] for row in part.own])
        for row in part.own:
            position, place, view = views[row]
            item = self.pictures.items[place]
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
            part = self._left(part, [self.pictures.items[place].id for _, place, _ in views], lost)
        if part.size and not rows:
            rows[0] = self._nothing(*views[0][1:])
        return list(rows.values()), part

    def _left(self, part: RowShard, ids: Sequence[str], lost: Mapping[int, LdmError]) -> RowShard:
        """What is left of a part when all processes have said which pictures (row -> why) they could not read."""
        group = current()
        gone = group.any_of([row in lost for row in range(len(ids))])
        if not any(gone):
            return part
        told = group.gathered([json.dumps([row, str(error)]) for row, error in lost.items()])
        for row, text in sorted(map(json.loads, told)):
            self._lose(ids[row], lost.get(row) or DataError(text))
        kept = [row for row, was in enumerate(gone) if not was]
        return rows_of(len(kept), [i for i, row in enumerate(kept) if row in part.own], group.world)

    def _nothing(self, place: int, view: View) -> Row:
        """A row of the batch's size that is no picture: for a process that has none of them."""
        import torch

        vae = self._encoders.vae
        shape = (vae.latent_channels, view.size.height // vae.factor, view.size.width // vae.factor)
        return place, view, torch.zeros(shape), ""

    def _batch(self, rows: Sequence[Row], part: RowShard) -> Batch:
        import torch

        captions = [caption for _, _, _, caption in rows]
        time_ids = torch.tensor([view.time_ids for _, view, _, _ in rows], dtype=torch.float32) if self.xl else None
        return Batch(
            torch.stack([latents for _, _, latents, _ in rows]).to(self.device),
            captions,
            self._embedded(captions) if self.texts else None,
            None if time_ids is None else time_ids.to(self.device),
            [self.pictures.items[place].id for place, _, _, _ in rows if part.weight],
            part,
        )

    def _embedded(self, captions: list[str]) -> Conditioning:
        import torch

        from ldm.nn.text import Conditioning

        fresh = self._shuffled(captions) if self.data.shuffle_tags else {}
        kept = [fresh.get(c) or self._memory.get(c, partial(self._embedding, c)) for c in captions]
        parts = [Conditioning(*own) for own in kept]
        return Conditioning.cat(parts).to(self.device, torch.float32)

    def _shuffled(self, captions: Sequence[str]) -> dict[str, tuple[Tensor | None, ...]]:
        """The embeddings of captions that will not come again in this order, but for the empty one."""
        texts = list(dict.fromkeys(filter(None, captions)))
        if not texts:
            return {}
        found = self._encoders.embed(texts, together=True)
        parts = [found.get(name) for name in EMBEDDED]
        return {text: tuple(None if p is None else p[i : i + 1] for p in parts) for i, text in enumerate(texts)}

    def _embedding(self, caption: str) -> tuple[Tensor | None, ...]:
        """States (1, S, D), pooled (1, P) and mask (1, S) of a caption."""
        if self._texts_kept:
            found = {name: tensor[None] for name, tensor in self._cache.text(caption).items()}
        else:
            found = self._encoders.embed([caption])
        return tuple(found.get(name) for name in EMBEDDED)
