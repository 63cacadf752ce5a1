"""A prepared dataset (`ldm data cache`) behind the interface of a dataset, in memory that does not grow.

Shapes:  C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.data.cache.prepared import list_shards, read_info
from ldm.data.cache.sequence import WINDOW_BYTES, Rows, ShardSequence
from ldm.data.sources.walk import PREPARED
from ldm.data.transforms import choose_caption
from ldm.errors import DataError
from ldm.training.data.encoded import EMBEDDED, Embedding, Encoders, Row, embed_rows
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.settings import FinetuneData


class PreparedSet:
    """A prepared dataset on disk, as far as it is made, in place of a set of images. Raises DataError."""

    def __init__(self, data: FinetuneData):
        self.data, self.folder = data, Path(data.folder)
        self.info, shards = read_info(self.folder), list_shards(self.folder)
        self.trained = [shard for shard in shards if not shard.held]
        self.held = [shard for shard in shards if shard.held]
        if not self.trained:
            raise DataError("holds no image to train on yet", where=self.folder, hint="go on with ldm data cache")

    @property
    def lines(self) -> list[str]:
        """What was prepared, and how many images are there and held out."""
        info, trained, held = self.info, *(sum(s.rows for s in some) for some in (self.trained, self.held))
        part = "" if trained + held >= info["images"] else f" of {info['images']}, as far as they are made"
        samples = sum(shard.samples for shard in self.trained)
        epoch = f"; an epoch has {samples} samples" if samples != trained else ""
        texts = "with embeddings of their captions" if info["embeddings"] else "whose captions are encoded in training"
        return [
            f"{self.folder}: latents of {info['source']} at {info['resolution']} px, {texts}",
            f"{trained + held} images{part}: {trained} to train on, {held} held out{epoch}",
        ]

    def check(self, ids: tuple[str, str], texts: bool) -> None:
        """Raise DataError unless the fingerprints of the autoencoder and the text encoder are those of the set."""
        told = "was made with another {}; give that one, or make the cache again"
        if self.info["vae_hash"] != ids[0]:
            raise DataError(told.format(f"autoencoder ({self.info['vae']})"), where=self.folder / PREPARED)
        if self.info["embeddings"] and texts and " ".join(self.info["text_hash"]) != ids[1]:
            raise DataError(told.format("text encoder"), where=self.folder / PREPARED)


class Prepared:
    """Shards in sequence with a keyed shuffle; captions without a stored embedding are embedded here."""

    def __init__(
        self,
        images: PreparedSet,
        encoders: Encoders,
        seed: int,
        batch_size: int,
        texts: bool,
        window_bytes: int = WINDOW_BYTES,
    ):
        images.check(encoders.ids, texts)
        self.data, self.encoders, self.seed = images.data, encoders, seed
        self.sequence = ShardSequence(images.trained, batch_size, seed, window_bytes)
        self._held = ShardSequence(images.held, batch_size, 0, window_bytes) if images.held else None
        self._stored: dict[str, Embedding] = {}  # of the captions that were given out last

    def __len__(self) -> int:
        return -(-self.samples // self.sequence.batch_size)

    @property
    def samples(self) -> int:
        return self.sequence.samples

    @property
    def hash(self) -> str:
        """Of the names of the shards, which hold digests of their content."""
        return self.sequence.hash

    def rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which rows they are; one that does not count where it has none."""
        found, rows = self.sequence.at(number), []
        part = current().part(len(found.ids))
        self._stored = {}
        for i in part.own or (0,):
            mean, std, repeat = found.mean[i].float(), found.std[i].float(), found.repeat[i]
            key = (found.epoch, (found.ids[i], repeat) if repeat else found.ids[i])
            latents = mean + std * seeded.normal(tuple(mean.shape), self.seed, "latents", *key)
            caption = choose_caption(found.captions[i], self.data.caption_dropout, self.seed, *key)
            rows.append(self._row(found, i, latents, caption))
        return rows, part

    def _row(self, rows: Rows, i: int, latents: Tensor, caption: str) -> Row:
        if caption and rows.texts[i]:
            place = rows.captions[i].index(caption)
            named = {name: tensor[place : place + 1] for name, tensor in rows.texts[i].items()}
            self._stored[caption] = tuple(named.get(name) for name in EMBEDDED)
        mask = None if rows.mask is None else rows.mask[i]
        return Row(rows.ids[i], latents, caption, tuple(rows.sizes[i].tolist()), mask)

    def pixels(self, number: int) -> tuple[list[Row], RowShard]:
        raise NotImplementedError  # there are latents alone

    def held_out(self) -> list[list[Row]]:
        """Batches of the held-out images: the posterior's mean, the first caption, none dropped."""
        self._stored, batches = {}, []
        while self._held is not None and (rows := self._held.at(len(batches))).epoch == 0:
            captions = [(*several, "")[0] for several in rows.captions]
            batches.append([self._row(rows, i, rows.mean[i].float(), c) for i, c in enumerate(captions)])
        return batches

    def examples(self, count: int) -> list[tuple[str, Tensor]]:
        return []

    def held_out_pixels(self, count: int) -> list[Tensor]:
        return []

    def captions(self, count: int | None) -> list[str]:
        """Those of the first batch: to read all would take as long as an epoch."""
        return [several[0] for several in self.sequence.at(0).captions if several][:count]

    def embedded(self, captions: Sequence[str]) -> Mapping[str, Embedding]:
        """The stored embeddings; other captions are embedded together, and not kept."""
        others = [caption for caption in captions if caption not in self._stored]
        return {**self._stored, **embed_rows(self.encoders, others)} if any(others) else self._stored

    def embedding(self, caption: str) -> dict[str, Tensor]:
        return self.encoders.embed([caption])

    def close(self) -> None:
        """Nothing outlives the process: shards are read by a thread."""
