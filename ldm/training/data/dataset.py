"""The one dataset of every stage: batches by number, of a set of images, a prepared one, or drawn scenes.

Shapes:  B samples of a batch   C, h, w latent channels, height, width   H, W image size
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.console import say
from ldm.device import sent
from ldm.nn.text import Conditioning
from ldm.training.data.encoded import EMBEDDED, Encoders, Memory, Row
from ldm.training.data.epochs import Epochs
from ldm.training.data.images import ImageSet
from ldm.training.data.prepared import Prepared, PreparedSet
from ldm.training.data.scenes import Scenes, SceneSet
from ldm.training.distributed import RowShard


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
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1]: what a ControlNet sees
    prior: Batch | None = None  # of images of what the model is to keep, trained in the same step
    weight: float = 1.0  # of its mean loss in that of the step's batches, where these differ in size


class ImageDataset:
    """The images of a set, of a prepared one, or drawn scenes, encoded, and their batches by number.

    Counts are printed before the first image is encoded. `out` is the run's folder, where the cache is unless the
    settings name another. With `texts` the batches carry the captions' embeddings, else the captions alone, for a text
    encoder that is trained; an empty caption is embedded as None, as guidance embeds it. With `xl` they carry sizes and
    crops. Without `encoders` there are pixels alone: see `PixelDataset`. Raises DataError, ConfigError, ResourceError,
    Interrupted.
    """

    _epochs: type[Epochs] = Epochs  # what reads an ImageSet

    def __init__(
        self,
        images: ImageSet | PreparedSet | SceneSet,
        encoders: Encoders | None,
        seed: int,
        batch_size: int,
        out: Path,
        texts: bool = True,
        xl: bool = False,
    ):
        self.images, self.data, self.texts, self.xl = images, images.data, texts, xl
        self._encoders, self._memory = encoders, Memory()
        say("\n".join(images.lines))
        self._reader: Epochs | Scenes | Prepared
        if isinstance(images, PreparedSet):
            assert encoders is not None  # the checks refuse it for a stage that reads pixels
            self._reader = Prepared(images, encoders, seed, batch_size, texts)
        elif isinstance(images, SceneSet):
            self._reader = Scenes(images, encoders, batch_size, texts)
        else:
            self._reader = self._epochs(images, encoders, self._memory, seed, batch_size, Path(out), texts)
        self.lines = images.lines

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._reader)

    @property
    def samples(self) -> int:
        """Samples in an epoch, repeats counted."""
        return self._reader.samples

    @property
    def inputs(self) -> dict[str, str]:
        """The digest of what is trained on, where the settings do not determine it."""
        known = self.images if isinstance(self.images, ImageSet) else self._reader
        return {} if isinstance(known, Scenes) else {"data": known.hash}

    def batch(self, number: int) -> Batch:
        """The number-th batch since the beginning, always the same.

        Of several processes each gets its rows, and reads no other images; all have to ask for the same batch. The
        last batch of a bucket may be smaller. With `cache=off` an image that is gone or changed is left out with a
        warning, and an empty batch is replaced by the next one. Raises DataError where more images are lost than
        `max_bad` allows, or the cache was damaged since it was filled.
        """
        return self._batch(*self._reader.rows(number))

    def batches(self, first_step: int, steps: int, accumulation: int) -> Iterator[Batch]:
        """The batches of the steps from `first_step` on; whatever reads ahead for them ends with the last one.

        Those of a step are made together, for each image has the same weight in it, whatever batch it is in.
        """
        return self._of_steps(self.batch, first_step, steps, accumulation)

    def _of_steps(self, make: Callable[[int], Any], first_step: int, steps: int, accumulation: int) -> Iterator[Any]:
        try:
            for step in range(first_step, steps):
                numbers = range(step * accumulation, (step + 1) * accumulation)
                yield from weighed([make(number) for number in numbers])
        finally:
            self.close()

    def held_out(self) -> list[Batch]:
        """The batches of held-out images, always the same: the posterior's mean, the first caption, none dropped."""
        return [self._batch(rows, RowShard(len(rows))) for rows in self._reader.held_out()]

    def captions(self, count: int | None) -> Iterable[str]:
        """The first caption of the first `count` images or scenes; of a set of images with None every caption."""
        return self._reader.captions(count)

    def close(self) -> None:
        """End the processes that make samples ahead; another batch starts new ones."""
        self._reader.close()

    def _batch(self, rows: Sequence[Row], part: RowShard) -> Batch:
        assert self._encoders is not None
        captions, device = [row.caption for row in rows], self._encoders.device
        time_ids = torch.tensor([row.time_ids for row in rows], dtype=torch.float32) if self.xl else None
        masks = [row.mask for row in rows if row.mask is not None]  # of all or of none
        controls = [row.control.expand(3, -1, -1) for row in rows if row.control is not None]
        return Batch(
            sent(torch.stack([row.latents for row in rows]), device),
            captions,
            self._embedded(captions).to(device, torch.float32) if self.texts else None,
            None if time_ids is None else sent(time_ids, device),
            [row.id for row in rows if part.weight],
            part,
            sent(torch.stack(masks), device, torch.float32) if masks else None,
            sent(torch.stack(controls), device, torch.float32) / 255 if controls else None,
        )

    def _embedded(self, captions: list[str]) -> Conditioning:
        made = self._reader.embedded(captions)
        rows = [made.get(c) or self._memory.get(c, partial(self._embedding, c)) for c in captions]
        return Conditioning.cat([Conditioning(*row) for row in rows])

    def _embedding(self, caption: str) -> tuple[Tensor | None, ...]:
        """States (1, S, D), pooled (1, P) and mask (1, S) of a caption."""
        tensors = self._reader.embedding(caption)
        return tuple(tensors.get(name) for name in EMBEDDED)


def weighed(batches: Sequence[Any]) -> list[Any]:
    """The batches of a step with their weights: their mean is the mean of all samples, not of the batches."""
    sizes = [batch.part.size for batch in batches]
    if len(set(sizes)) == 1:
        return list(batches)
    return [replace(b, weight=size * len(sizes) / sum(sizes)) for b, size in zip(batches, sizes)]
