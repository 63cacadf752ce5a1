"""Batches of a prepared dataset (`ldm data cache`), as `LatentDataset` gives them, in memory that does not grow.

Shapes:  B samples of a batch   C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.console import say
from ldm.data.cache.prepared import INFO, list_shards, read_info
from ldm.data.cache.sequence import WINDOW_BYTES, Rows, ShardSequence
from ldm.data.transforms import choose_caption
from ldm.errors import DataError
from ldm.nn.text import Conditioning
from ldm.training.data.dataset import EMBEDDED, Batch
from ldm.training.data.encoded import Encoders, Memory
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded


class PreparedDataset:
    """The batches of a prepared dataset by number, and those that are held out.

    `hashes` are the fingerprints of the run's autoencoder and text encoders, which have to be those of the set (of the
    text where it has embeddings). With `texts` batches carry the captions' embeddings, encoded here where the set has
    none. With `xl` they carry sizes and crops. A set that is still being made is read as far as it is there when the
    run begins. Raises DataError.
    """

    def __init__(
        self,
        folder: str | Path,
        encoders: Encoders,
        hashes: tuple[str, Sequence[str]],
        seed: int,
        batch_size: int,
        caption_dropout: float,
        texts: bool = True,
        xl: bool = False,
        window_bytes: int = WINDOW_BYTES,
    ):
        self.folder, self.encoders, self.seed, self.dropout = Path(folder), encoders, seed, caption_dropout
        self.batch_size, self.texts, self.xl, self.device = batch_size, texts, xl, encoders.device
        self.info = read_info(folder)
        self._check(*hashes)
        shards = list_shards(folder)
        held = [shard for shard in shards if shard.held]
        trained = [shard for shard in shards if not shard.held]
        if not trained:
            raise DataError("holds no image to train on yet", where=folder, hint="go on with ldm data cache")
        self._sequence = ShardSequence(trained, batch_size, seed, window_bytes)
        self._held = ShardSequence(held, batch_size, 0, window_bytes) if held else None
        self._memory = Memory()
        self.hash = self._sequence.hash
        self.lines = self._lines()
        say("\n".join(self.lines))

    def _check(self, vae: str, texts: Sequence[str]) -> None:
        told = "was made with another {}; give that one, or make the cache again"
        if self.info["vae_hash"] != vae:
            raise DataError(told.format(f"autoencoder ({self.info['vae']})"), where=self.folder / INFO)
        if self.info["embeddings"] and self.texts and self.info["text_hash"] != list(texts):
            raise DataError(told.format("text encoder"), where=self.folder / INFO)

    def _lines(self) -> list[str]:
        info, held = self.info, self._held.samples if self._held else 0
        there = self._sequence.samples + held
        part = "" if there >= info["images"] else f" of {info['images']}, as far as they are made"
        texts = "with embeddings of their captions" if info["embeddings"] else "whose captions are encoded in training"
        return [
            f"{self.folder}: latents of {info['source']} at {info['resolution']} px, {texts}",
            f"{there} images{part}: {self._sequence.samples} to train on, {held} held out",
        ]

    @property
    def samples(self) -> int:
        """Samples in an epoch."""
        return self._sequence.samples

    def batch(self, number: int) -> Batch:
        """The number-th batch since the beginning, always the same; of several processes each gets its rows."""
        rows = self._sequence.at(number)
        part = current().part(len(rows.ids))
        index = list(part.own) or [0]
        latents, captions = [], []
        for i in index:
            mean, std, key = rows.mean[i].float(), rows.std[i].float(), (rows.epoch, rows.ids[i])
            latents.append(mean + std * seeded.normal(tuple(mean.shape), self.seed, "latents", *key))
            captions.append(choose_caption(rows.captions[i], self.dropout, self.seed, *key))
        return self._batch(rows, index, torch.stack(latents), captions, part)

    def held_out(self) -> list[Batch]:
        """The batches of held-out images, always the same: the posterior's mean, the first caption, none dropped."""
        found: list[Batch] = []
        while self._held is not None and (rows := self._held.at(len(found))).epoch == 0:
            captions = [(*several, "")[0] for several in rows.captions]
            index = list(range(len(captions)))
            found.append(self._batch(rows, index, rows.mean.float(), captions, RowShard(len(index))))
        return found

    def _batch(self, rows: Rows, index: Sequence[int], latents: Tensor, captions: list[str], part: RowShard) -> Batch:
        return Batch(
            latents.to(self.device),
            captions,
            self._embedded(rows, index, captions) if self.texts else None,
            rows.sizes[list(index)].to(self.device) if self.xl else None,
            [rows.ids[i] for i in index if part.weight],
            part,
            mask=None if rows.mask is None else rows.mask[list(index)].to(self.device),
        )

    def _embedded(self, rows: Rows, index: Sequence[int], captions: Sequence[str]) -> Conditioning:
        """The captions' embeddings: those of the set, that of no caption, and all others in one batch."""
        found: dict[str, tuple[Tensor | None, ...]] = {}
        if "" in captions:
            found[""] = self._memory.get("", lambda: _parts(self.encoders.embed([""])))
        for i, caption in zip(index, captions):
            if caption and rows.texts[i]:
                place = rows.captions[i].index(caption)
                found[caption] = _parts({name: t[place : place + 1] for name, t in rows.texts[i].items()})
        if others := [caption for caption in dict.fromkeys(captions) if caption not in found]:
            cond = Conditioning(*_parts(self.encoders.embed(others, together=True)))
            found |= {caption: tuple(cond[row].inputs[name] for name in EMBEDDED) for row, caption in enumerate(others)}
        return Conditioning.cat([Conditioning(*found[c]) for c in captions]).to(self.device, torch.float32)

    def close(self) -> None:
        """Stop reading ahead."""
        self._sequence.close()


def _parts(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(tensors.get(name) for name in EMBEDDED)
