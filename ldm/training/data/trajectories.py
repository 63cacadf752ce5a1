"""A teacher's trajectories from noise to images, drawn as they are needed and used for a while.

Which of them are in use at a step is a function of the settings and the step alone. Those in use lie in the run's
folder, so that a run which goes on draws only what was not drawn yet.

Shapes:  B rows of a batch   n segments   C, h, w latent channels, height, width
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm import files
from ldm.console import progress
from ldm.device import sent
from ldm.prompts import plain_text
from ldm.training.data.dataset import Batch
from ldm.training.data.drawn import DrawnSet
from ldm.training.data.images import ImageSet
from ldm.training.data.scenes import SceneSet, distinct
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.settings import PIECE, DistillSettings

FOLDER = "trajectories"  # in the run's folder
Captions = Callable[[int, int], list[str]]  # (start, count) -> so many captions from that one on, without an end


@dataclass(frozen=True, kw_only=True)
class Crossing(Batch):
    """Rows that are at a segment's upper end, `latents`, and where the teacher came to from there."""

    ends: Tensor  # (B, C, h, w) fp32: x at the segment's lower end
    which: Tensor  # (B,) number of the segment, from noise on


def captions_of(images: ImageSet | SceneSet | DrawnSet, count: int) -> tuple[Captions, list[str]]:
    """What is drawn of these, and up to `count` captions of which nothing is, or nothing from the same noise."""
    if isinstance(images, SceneSet):
        return images.samples().captions, list(distinct(images.samples(held_out=True), count))
    if isinstance(images, DrawnSet):
        trained = held_out = list(images.prompts)
    else:
        held = [item.digest in images.held_out for item in images.items]
        trained = [text for item, out in zip(images.items, held) if not out for text in item.captions or ("",)]
        held_out = [item.captions[0] for item, out in zip(images.items, held) if out and item.captions] or trained
    texts = list(map(plain_text, trained))
    return lambda start, number: [texts[i % len(texts)] for i in range(start, start + number)], held_out[:count]


class Trajectories:
    """`latent_pool` trajectories, of which random ones make a batch; the oldest piece is replaced as the settings say.

    `described` makes a batch of latents and captions; `draw` is the teacher: for a batch whose latents are unit noise
    it returns x (n + 1, B, C, h, w) where the segments begin and end, from noise to image. `origin` says what decides
    that besides the captions.
    """

    def __init__(
        self,
        settings: DistillSettings,
        captions: Captions,
        described: Callable[[Tensor, list[str], RowShard], Batch],
        draw: Callable[[Batch], Tensor],
        shape: tuple[int, int, int],
        out: Path,
        origin: str,
    ):
        self.settings, self.captions, self.described, self.draw = settings, captions, described, draw
        self.shape, self.folder, self.origin = shape, Path(out) / FOLDER, origin
        self.pieces = settings.latent_pool // PIECE
        self._kept: dict[int, tuple[Tensor, list[str]]] = {}  # x (PIECE, n + 1, C, h, w) and captions of a piece
        use = f"{settings.latent_pool}{' at a time' if settings.renew else ''}"
        self.lines = [f"the teacher draws {use} from captions alone, and the trajectories are learned"]

    def batches(self, first_step: int) -> Iterator[Crossing]:
        s = self.settings
        for step in range(first_step, s.steps):
            oldest = step // s.renew if s.renew else 0
            self._fill(oldest)
            for micro in range(s.accumulation):
                yield self._batch(oldest, step, micro)

    def held_out(self, captions: Sequence[str]) -> list[Crossing]:
        """Rows of captions that are not trained on, always the same."""
        s, found = self.settings, []
        for start in range(0, len(captions), s.batch_size):
            texts = list(captions[start : start + s.batch_size])
            noise = seeded.normal((len(texts), *self.shape), s.seed, "validation", start)
            found.append(self._crossing(self._drawn(noise, texts), texts, RowShard(len(texts)), start))
        return found

    def _batch(self, oldest: int, step: int, micro: int) -> Crossing:
        s = self.settings
        slots = seeded.integers(s.latent_pool, (s.batch_size,), s.seed, "rows", step, micro).tolist()
        part = current().part(s.batch_size)
        places = [(oldest + slots[row] // PIECE, slots[row] % PIECE) for row in part.own or (0,)]
        trajectories = torch.stack([self._kept[piece][0][at] for piece, at in places])
        captions = [self._kept[piece][1][at] for piece, at in places]
        return self._crossing(trajectories, captions, part, (step * s.accumulation + micro) * s.batch_size)

    def _crossing(self, trajectories: Tensor, captions: list[str], part: RowShard, before: int) -> Crossing:
        """One segment of each trajectory (B, n + 1, C, h, w), in turn; `before`: rows of the batches before it."""
        which = part.of(before + torch.arange(part.size)) % self.settings.segments
        rows = torch.arange(len(trajectories))
        batch = self.described(trajectories[rows, which], captions, part)
        return Crossing(**vars(batch), ends=sent(trajectories[rows, which + 1], batch.latents.device), which=which)

    def _fill(self, oldest: int) -> None:
        """Read or draw the pieces from number `oldest` on that are in use, and forget all others."""
        wanted = range(oldest, oldest + self.pieces)
        todo = [number for number in wanted if number not in self._kept]
        for number in progress(todo, desc="trajectories", unit="piece", disable=len(todo) < 2):
            self._kept[number] = self._piece(number)
        for number in self._kept.keys() - set(wanted):
            del self._kept[number]
            if current().first:
                self._path(number).unlink(missing_ok=True)

    def _piece(self, number: int) -> tuple[Tensor, list[str]]:
        s, captions = self.settings, self.captions(number * PIECE, PIECE)
        origin = hashlib.sha256("\n".join((self.origin, *captions)).encode()).hexdigest()
        trajectories = self._read(number, origin)
        if current().any_of([trajectories is None])[0]:
            noise = seeded.normal((PIECE, *self.shape), s.seed, "trajectories", number)
            part = current().part(PIECE)
            rows = torch.tensor(part.own or (0,)).split(s.batch_size)
            trajectories = torch.cat([self._drawn(noise[at], [captions[i] for i in at.tolist()]) for at in rows])
            trajectories = current().whole(trajectories, part)
            if current().first:
                self._write(number, trajectories, origin)
        assert trajectories is not None
        return trajectories, captions

    @torch.no_grad()
    def _drawn(self, noise: Tensor, captions: list[str]) -> Tensor:
        """(B, n + 1, C, h, w) fp32 on the CPU, from unit noise (B, C, h, w)."""
        batch = self.described(noise, captions, RowShard(len(captions)))
        return self.draw(batch).transpose(0, 1).float().cpu()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _read(self, number: int, origin: str) -> Tensor | None:
        """A piece that this run has drawn already; None where it is not there, or belongs to other settings."""
        try:
            with safe_open(self._path(number), "pt") as file:
                return file.get_tensor("x") if (file.metadata() or {}).get("origin") == origin else None
        except (OSError, SafetensorError):
            return None

    def _write(self, number: int, trajectories: Tensor, origin: str) -> None:
        tensors, metadata = {"x": trajectories.contiguous()}, {"origin": origin}
        files.atomic_write(self._path(number), lambda path: save_file(tensors, path, metadata))
