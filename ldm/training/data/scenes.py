"""Drawn emoji scenes behind the interface of a dataset: encoded piece by piece, and used for a while.

What is in use at a step is a function of the settings and the step alone, so that a resumed run refills it exactly.

Shapes:  N scenes in use   C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.config import require
from ldm.console import progress
from ldm.data.transforms import choose_caption, to_float
from ldm.device import fast_bf16
from ldm.training.data.conditions import condition_pixels, control_kind
from ldm.training.data.encoded import Embedding, Encoders, Row, embed_rows
from ldm.training.data.samples import EmojiSamples, stream
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.settings import PIECE, DataSettings, Settings

SEED_OFFSET = 1_000_003  # from the seed of the scenes that are trained on to that of the held-out ones
ENCODED_AT_ONCE = 32  # images
POOL: dict[str, Any] = {"latent_pool": 0, "renew": 0, "control": None}  # settings that some stages have


@dataclass(frozen=True)
class SceneSet:
    """Endless drawn scenes, in place of a set of images."""

    data: DataSettings
    seed: int
    size: int  # N, scenes in use; 0: each is used once
    renew: int  # steps after which a piece of them is replaced; 0: never
    workers: int  # processes that draw
    accumulation: int  # batches of a step
    validation: int  # held-out scenes
    control: str | None = None  # what a ControlNet sees of them: a kind of condition

    @classmethod
    def of(cls, settings: Settings, data: DataSettings) -> SceneSet:
        """Those of a stage's settings, and of its data. Raises ConfigError."""
        s = settings
        size, renew, control = (getattr(s, name, default) for name, default in POOL.items())
        kind = None if control is None else control_kind(control)
        what = f"{control} is a folder, and drawn scenes have no names: give a kind, such as edges"
        require(control is None or kind is not None, what, "control")
        made = cls(data, s.seed, size, renew, s.workers, s.accumulation, getattr(s, "validation", 1), kind)
        made.samples()
        return made

    def samples(self, held_out: bool = False) -> EmojiSamples:
        return EmojiSamples(self.data, self.seed + SEED_OFFSET * held_out, held_out)

    @property
    def lines(self) -> list[str]:
        side = self.data.resolution
        use = f", {self.size} {'at a time' if self.renew else 'of them'}" if self.size else ""
        return [f"emoji scenes of {side}x{side} px, drawn as needed{use}; every tenth combination is held out"]


class Scenes:
    """Scenes in slots, of which random ones make a batch; the oldest piece is replaced as often as the settings say."""

    samples = 0  # there are no epochs

    def __init__(self, scenes: SceneSet, encoders: Encoders | None, batch_size: int, texts: bool):
        self.scenes, self.batch_size, self._encoders, self._texts = scenes, batch_size, encoders, texts
        self._pieces, self._next = scenes.size // PIECE, 0  # number of the next piece to be made
        self._stream: Iterator[tuple[Tensor, list[str]]] | None = None
        self._at = 0  # the number of the scene or batch that the stream gives next
        self._latents: Tensor | None = None  # (N, C, h, w) fp32
        self._controls: Tensor | None = None  # uint8 (N, C, H, W), where a ControlNet is trained
        self._captions: list[str] = [""] * scenes.size
        self._embedded: dict[str, Embedding] = {}
        side = scenes.data.resolution
        self._time_ids = (side, side, 0, 0, side, side)

    def __len__(self) -> int:
        return 0

    def rows(self, number: int) -> tuple[list[Row], RowShard]:
        """This process's samples of a batch, and which rows they are; one that does not count where it has none."""
        s = self.scenes
        step, micro = divmod(number, s.accumulation)
        self._fill(step // s.renew if s.renew else 0)
        assert self._latents is not None
        slots = seeded.integers(s.size, (self.batch_size,), s.seed, "rows", step, micro).tolist()
        part, rows = current().part(self.batch_size), []
        for row in part.own or (0,):
            slot = slots[row]
            caption = choose_caption((self._captions[slot],), s.data.caption_dropout, s.seed, number, row)
            control = None if self._controls is None else self._controls[slot]
            row_text, latents = self._captions[slot], self._latents[slot]
            rows.append(Row(row_text, latents, caption, self._time_ids, control=control))
        return rows, part

    def _fill(self, oldest: int) -> None:
        """Make the pieces from number `oldest` on that are not in use yet."""
        if not oldest <= self._next <= oldest + self._pieces:  # at the start, and where a run goes back
            self.close()
            self._next = oldest
        todo = range(self._next, oldest + self._pieces)
        if self._latents is None or (self._stream is None and todo):
            self.close()
            workers = self.scenes.workers if self.scenes.renew else 0
            todo = range(oldest, oldest + self._pieces) if self._latents is None else todo
            self._stream = stream(self.scenes.samples(), todo[0] * PIECE, PIECE, workers)
        for piece in progress(todo, desc="scenes", unit="piece", disable=len(todo) < 2):
            self._make(piece)
        self._next = oldest + self._pieces

    def _make(self, piece: int) -> None:
        assert self._stream is not None and self._encoders is not None
        images, captions = next(self._stream)
        images = images.permute(0, 3, 1, 2)
        latents = self._encoded(images)
        if self._latents is None:
            self._latents = latents.new_empty((self.scenes.size, *latents.shape[1:]))
        place = piece % self._pieces * PIECE
        old = Counter(self._captions[place : place + PIECE])
        self._latents[place : place + PIECE] = latents
        if (made := self._conditions(images)) is not None:
            if self._controls is None:
                self._controls = made.new_empty((self.scenes.size, *made.shape[1:]))
            self._controls[place : place + PIECE] = made
        self._captions[place : place + PIECE] = captions
        if self._texts:
            in_use = set(self._captions)
            for caption in old.keys() - in_use:
                self._embedded.pop(caption, None)
            new = embed_rows(self._encoders, sorted(set(captions) - self._embedded.keys()))
            for caption, tensors in new.items():  # copies, which do not keep what was embedded beside them
                self._embedded[caption] = tuple(None if t is None else t.clone() for t in tensors)

    def _conditions(self, images: Tensor) -> Tensor | None:
        """uint8 (B, 3, H, W) -> (B, C, H, W); None where no ControlNet is trained."""
        kind = self.scenes.control
        return None if kind is None else torch.stack([condition_pixels(kind, image) for image in images])

    @torch.no_grad()
    def _encoded(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → scaled latents (B, C, h, w) fp32: the posterior's mean, in bf16 where that is faster."""
        assert self._encoders is not None
        vae, device = self._encoders.vae, self._encoders.device
        with torch.autocast(device.type, torch.bfloat16, enabled=fast_bf16(device)):
            parts = images.split(ENCODED_AT_ONCE)
            return torch.cat([vae.encode(to_float(part.to(device))).float() for part in parts])

    def pixels(self, number: int) -> tuple[list[Row], RowShard]:
        """The scenes in their order, with uint8 (3, H, W) in place of latents."""
        if self._stream is None or self._at != number:
            self.close()
            self._stream = stream(self.scenes.samples(), number * self.batch_size, self.batch_size, self.scenes.workers)
        (images, captions), self._at = next(self._stream), number + 1
        images, part = images.permute(0, 3, 1, 2), current().part(self.batch_size)
        return [Row(captions[row], images[row], captions[row], ()) for row in part.own or (0,)], part

    def held_out(self) -> list[list[Row]]:
        """Held-out scenes whose captions differ."""
        samples = self.scenes.samples(held_out=True)
        found = list(distinct(samples, self.scenes.validation).items())
        batches = []
        for start in range(0, len(found), ENCODED_AT_ONCE):
            part = found[start : start + ENCODED_AT_ONCE]
            images = torch.stack([_pixels(samples, index) for _, index in part])
            latents, controls = self._encoded(images), self._conditions(images)
            seen = [None] * len(part) if controls is None else list(controls)
            rows = zip(part, latents, seen)
            batches.append([Row(text, z, text, self._time_ids, control=made) for (text, _), z, made in rows])
        return batches

    def examples(self, count: int) -> list[tuple[str, Tensor]]:
        """(caption, condition uint8 (C, H, W)) of held-out scenes."""
        samples = self.scenes.samples(held_out=True)
        chosen = list(distinct(samples, count).items())
        controls = self._conditions(torch.stack([_pixels(samples, index) for _, index in chosen]))
        return [] if controls is None else [(text, made) for (text, _), made in zip(chosen, controls)]

    def held_out_pixels(self, count: int) -> list[Tensor]:
        samples = self.scenes.samples(held_out=True)
        return [_pixels(samples, index) for index in range(count)]

    def captions(self, count: int | None) -> Iterable[str]:
        return self.scenes.samples().captions(0, self.scenes.size if count is None else count)

    def embedded(self, captions: Sequence[str]) -> Mapping[str, Embedding]:
        """Of the scenes in use; others are embedded together."""
        assert self._encoders is not None
        others = [caption for caption in captions if caption not in self._embedded]
        return {**self._embedded, **embed_rows(self._encoders, others)} if any(others) else self._embedded

    def embedding(self, caption: str) -> dict[str, Tensor]:
        assert self._encoders is not None
        return self._encoders.embed([caption])

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()  # type: ignore[attr-defined]  # a generator, whose workers end with it
        self._stream = None


def distinct(samples: EmojiSamples, count: int) -> dict[str, int]:
    """caption → index of the first `count` samples whose captions differ (fewer where 50 × count hold no more)."""
    found: dict[str, int] = {}
    for index in range(50 * count):
        found.setdefault(samples.captions(index, 1)[0], index)
        if len(found) == count:
            break
    return found


def _pixels(samples: EmojiSamples, index: int) -> Tensor:
    return torch.from_numpy(samples[index][0]).permute(2, 0, 1)
