"""Which of the 849 sprites a picture shows, and the colour of its ground: template matching, no network.

A sprite with coverage a and colour s on ground g differs from the plain ground by a·(s − g). With P the picture minus
its ground, the inner product of P with that difference is <P, a·s> − <P·g, a>: linear in the four channels (a·s, a),
so that one matrix product compares a picture with all sprites on any ground.

Shapes:  K sprites   W windows (hypotheses of size and place)   N cells along the side of a template   F = 4·N·N
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldm.data.emoji import COLOURS, find_font, nearest_colour, objects, scaled
from ldm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.data.emoji import EmojiObject

FRAME = 128  # pictures of other sizes are resized to this
MARGIN = 4 / 3  # side of a window by the side of the object inside it
COARSE, FINE = 32, 64  # cells along a template
SIZES, SHIFTS = (84, 90, 96, 102, 108), (-8, -4, 0, 4, 8)  # px: where a single object is looked for
CANDIDATES, WINDOWS, FINALISTS = 40, 12, 5  # kept after the coarse stage, and for the last step
AFTER = 10.0  # puts the scores of sprites that the fine stage left out after all others
RING = 4  # px at the border that belong to the ground
SAME = 48.0  # RGB distance within which two pixels are of one colour
DETAIL = 0.25  # how much edges and texture are made stronger
SHARP = 1.5  # the same once more, for telling a clear thing from a blob
BLUR = 0.05  # share of a template: what is finer than this is edges and texture

Window = tuple[float, float, float]  # centre x, centre y, side of the object: px of 128


@dataclass(frozen=True)
class Ground:
    """The ground of a picture: what it is, the nearest of the twelve colours and how far that is."""

    rgb: tuple[float, float, float]  # 0..255
    colour: str
    distance: float  # RGB, 0..442
    share: float = 1.0  # of the pixels looked at: near 1 on a plain ground, near 0 on noise


@dataclass(frozen=True)
class Verdict:
    """What the judge says: the ground, and look-alike classes from the likeliest on with their match in [0, 1]."""

    ground: Ground
    guesses: tuple[EmojiObject, ...]  # the best-matching object of each class
    matches: tuple[float, ...]
    window: Window  # where the first guess fits best
    clear: float  # [0, 1]: agreement of the first guess in its edges and texture above all

    @property
    def match(self) -> float:
        """Whether a clear thing stands on a plain ground: near 1 on a drawn scene, low on blobs, near 0 on noise."""
        return self.clear * self.ground.share

    def rank(self, thing: EmojiObject) -> int:
        """Place of an object's class among the guesses, from 0; the number of guesses where it is not among them."""
        return next((i for i, guess in enumerate(self.guesses) if guess.looks == thing.looks), len(self.guesses))


def to_array(picture: Image | np.ndarray) -> np.ndarray:
    """A PIL picture or uint8 (H, W, 3) array as uint8 (128, 128, 3). Raises DataError for anything else."""
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(f"expected uint8 (H, W, 3), got {picture.dtype} {picture.shape}", where="judge")
        picture = Image.fromarray(picture)
    if picture.size != (FRAME, FRAME):
        picture = picture.convert("RGB").resize((FRAME, FRAME), Image.Resampling.LANCZOS)
    return np.asarray(picture.convert("RGB"))


def ground_of(pixels: np.ndarray) -> Ground:
    """The ground's colour, from the commonest colour along the border of uint8 (128, 128, 3)."""
    ring = np.ones(pixels.shape[:2], bool)
    ring[RING:-RING, RING:-RING] = False
    return commonest(pixels[ring])


def commonest(colours: np.ndarray) -> Ground:
    """The middle of the commonest colour among (n, 3) pixels: the fullest cell of a coarse histogram, then its mean."""
    values = colours.astype(np.float32)
    cells, counts = np.unique((colours // 32).astype(np.int64) @ (64, 8, 1), return_counts=True)
    fullest = cells[counts.argmax()]
    middle = (np.array((fullest // 64, fullest // 8 % 8, fullest % 8)) + 0.5) * 32
    for _ in range(3):
        near = values[((values - middle) ** 2).sum(1) <= SAME**2]
        middle = np.median(near, axis=0) if len(near) else middle
    rgb = tuple(float(v) for v in middle)
    name = nearest_colour(rgb)
    return Ground(rgb, name, float(np.linalg.norm(middle - COLOURS[name])), len(near) / len(values))


def around(x: float, y: float, sizes: Iterable[float], right: Iterable[float], down: Iterable[float]) -> list[Window]:
    """Windows of all sizes at all displacements from (x, y)."""
    return [(x + dx, y + dy, size) for size in sizes for dy in down for dx in right]


class Judge:
    """All sprites as templates; about a second to set up. `shared_judge()` gives the one that everybody shares.

    Raises DataError where the font is missing.
    """

    def __init__(self, font: str | Path | None = None):
        path = find_font(font)
        self.objects = objects()
        side = round(FRAME / MARGIN)
        fine = np.stack([_template(np.asarray(scaled(o.char, side, path))) for o in self.objects])  # (K, 64, 64, 4)
        coarse = fine.reshape(-1, COARSE, 2, COARSE, 2, 4).mean((2, 4))
        self._coarse, self._fine = Bank(coarse), Bank(fine)
        classes = {name: i for i, name in enumerate(dict.fromkeys(o.looks for o in self.objects))}
        self.classes = np.array([classes[o.looks] for o in self.objects])  # (K,) number of the class

    def __call__(self, picture: Image | np.ndarray) -> Verdict:
        """Judge a picture of one object on a plain ground."""
        pixels = to_array(picture)
        windows = around(FRAME / 2, FRAME / 2, SIZES, SHIFTS, SHIFTS)
        return self.look(pixels, ground_of(pixels), windows)

    def look(self, pixels: np.ndarray, ground: Ground, windows: Sequence[Window]) -> Verdict:
        """The sprites that fit best in any of the windows of uint8 (128, 128, 3), on this ground."""
        view = View(pixels, ground)
        scores = self._coarse.match(view, windows)  # (W, K)
        best = scores.max(0)
        kept = np.argsort(-best, kind="stable")[:CANDIDATES]
        scores = scores[:, kept]
        of_the_first, of_any = scores.argmax(0)[: WINDOWS // 2], np.argsort(-scores.max(1), kind="stable")
        near = [windows[i] for i in list(dict.fromkeys([*of_the_first.tolist(), *of_any.tolist()]))[:WINDOWS]]
        scores = self._fine.match(view, near, kept)  # (12, 40)
        place = scores.argmax(0)
        best -= AFTER
        best[kept] = scores.max(0)
        last = np.argsort(-scores.max(0), kind="stable")[:FINALISTS]
        found = {}
        for i in last:
            best[kept[i]], found[kept[i]] = self._refine(view, kept[i], near[place[i]], scores[place[i], i])
        return self._verdict(view, ground, best, found)

    def _refine(self, view: View, sprite: int, window: Window, score: float) -> tuple[float, Window]:
        """Climb in size and place by small steps."""
        x, y, size = window
        step = size / 48
        tried = [*around(x, y, (size,), (-step, 0, step), (-step, 0, step)), (x, y, size * 0.97), (x, y, size * 1.03)]
        scores = self._fine.match(view, tried, np.array([sprite]))[:, 0]
        i = int(scores.argmax())
        return (float(scores[i]), tried[i]) if scores[i] > score else (float(score), window)

    def _verdict(self, view: View, ground: Ground, best: np.ndarray, found: dict[int, Window]) -> Verdict:
        order = np.argsort(-best, kind="stable")
        _, first = np.unique(self.classes[order], return_index=True)
        ranked = order[np.sort(first)]
        matches = np.clip(np.where(best < -AFTER / 2, best + AFTER, best), 0, 1)[ranked]
        first, window = ranked[0], found[ranked[0]]
        clear = float(np.clip(self._fine.clear(view, window, first), 0, 1))
        guesses = tuple(self.objects[i] for i in ranked)
        return Verdict(ground, guesses, tuple(map(float, matches)), window, clear)


class View:
    """A picture minus its ground, seen through windows; outside the picture there is ground."""

    def __init__(self, pixels: np.ndarray, ground: Ground):
        from PIL import Image

        self.ground = np.array(ground.rgb, np.float32) / 255
        wide = np.empty((2 * FRAME, 2 * FRAME, 3), np.uint8)
        wide[:] = np.round(ground.rgb)
        wide[FRAME // 2 : -FRAME // 2, FRAME // 2 : -FRAME // 2] = pixels
        self._wide, self._ground8 = Image.fromarray(wide), wide[0, 0].astype(np.float32)

    def through(self, windows: Sequence[Window], cells: int) -> np.ndarray:
        """(W, cells, cells, 3) differences from the ground."""
        from PIL import Image

        seen = np.empty((len(windows), cells, cells, 3), np.float32)
        for i, (x, y, size) in enumerate(windows):
            half, shift = size * MARGIN / 2, FRAME / 2
            box = (x + shift - half, y + shift - half, x + shift + half, y + shift + half)
            seen[i] = self._wide.resize((cells, cells), Image.Resampling.BILINEAR, box=box)
        return (seen - self._ground8) / 255


class Bank:
    """Templates at one resolution, (K, N, N, 4): premultiplied colour and coverage, in [0, 1]."""

    def __init__(self, templates: np.ndarray):
        self.cells = templates.shape[1]
        self.rows = features(templates)  # (K, F)

    def match(self, view: View, windows: Sequence[Window], kept: np.ndarray | None = None) -> np.ndarray:
        """Agreement of each window with each sprite (W, K): 2<P, T> / (|P|² + |T|²), 1 for equal, about 0 for noise."""
        rows = self.rows if kept is None else self.rows[kept]
        return agreement(features(view.through(windows, self.cells)), rows, view.ground)

    def clear(self, view: View, window: Window, sprite: int) -> float:
        """Agreement of one window with one sprite where edges and texture weigh most."""
        seen = features(view.through([window], self.cells))
        sharp = [
            features(r.reshape(1, -1, self.cells, self.cells).transpose(0, 2, 3, 1), SHARP)
            for r in (seen, self.rows[sprite])
        ]
        return float(agreement(*sharp, view.ground)[0, 0])


def agreement(seen: np.ndarray, rows: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """2<P, T> / (|P|² + |T|²) of differences P (W, 3·N·N) from a ground (3,) with templates (K, 4·N·N): (W, K)."""
    plane = rows.shape[1] // 4
    last = -np.einsum("wcp,c->wp", seen.reshape(len(seen), 3, plane), ground)
    dot = np.concatenate([seen, last], axis=1) @ rows.T
    channels = rows.reshape(len(rows), 4, plane)
    on_ground = channels[:, :3] - ground[None, :, None] * channels[:, 3:]
    energy = np.einsum("kcp,kcp->k", on_ground, on_ground)
    return 2 * dot / ((seen**2).sum(1)[:, None] + energy[None] + 1e-6 * seen.shape[1])


def features(pictures: np.ndarray, detail: float = DETAIL) -> np.ndarray:
    """(n, N, N, C) → (n, C·N·N): each channel with its fine detail made stronger (a linear map of each channel)."""
    planes = np.array(pictures.transpose(0, 3, 1, 2), np.float32, order="C")
    blur = _blur(planes.shape[-1])
    coarse = blur @ (planes.reshape(-1, planes.shape[-1]) @ blur.T).reshape(planes.shape)
    coarse *= -detail
    planes *= 1 + detail
    planes += coarse
    return planes.reshape(len(planes), -1)


@functools.cache
def _blur(cells: int) -> np.ndarray:
    """A Gaussian blur along an axis as a matrix (N, N), zero outside."""
    distance = np.subtract.outer(np.arange(cells), np.arange(cells)) / (BLUR * cells)
    return (np.exp(-(distance**2) / 2) / (BLUR * cells * np.sqrt(2 * np.pi))).astype(np.float32)


def _template(rgba: np.ndarray) -> np.ndarray:
    """A sprite (96, 96, 4) uint8 in the middle of its window: float (64, 64, 4), premultiplied."""
    values = rgba.astype(np.float32) / 255
    values[..., :3] *= values[..., 3:]
    room = (FRAME - len(values)) // 2
    framed = np.pad(values, ((room, room), (room, room), (0, 0)))
    return framed.reshape(FINE, 2, FINE, 2, 4).mean((1, 3))


@functools.lru_cache(maxsize=1)
def shared_judge(font: str | Path | None = None) -> Judge:
    """The judge, set up once a process. Raises DataError where the font is missing."""
    return Judge(font)
