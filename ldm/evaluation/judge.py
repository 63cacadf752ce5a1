"""Which of the 849 sprites an image shows, and the colour of its background: template matching without a network.

A sprite with coverage a and colour s differs from a plain background of colour g by a·(s − g). With P the image minus
its background, the inner product of P with that difference is <P, a·s> − <P·g, a>. It is linear in the four channels
(a·s, a), so that one matrix product compares an image with all sprites on any background.

Shapes:  K sprites   W windows (hypotheses of size and place)   N cells along the side of a template   F = 4·N·N
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.data.emoji import COLOURS, EmojiObject, find_font, nearest_colour, objects, scaled
from ldm.errors import DataError

FRAME = 128  # px; images of other sizes are resized to it
MARGIN = 4 / 3  # side of a window by the side of the object inside it
COARSE, FINE = 32, 64  # cells along a template
SIZES, SHIFTS = (84, 90, 96, 102, 108), (-8, -4, 0, 4, 8)  # px: where a single object is looked for
CANDIDATES, WINDOWS, FINALISTS = 40, 12, 5  # kept after the coarse stage, and for the last step
AFTER = 10.0  # subtracted from the scores of sprites that the fine stage left out, so that they come last
RING = 4  # px at the border that belong to the background
SAME = 48.0  # RGB distance within which two pixels are of one colour
DETAIL = 0.25  # how much edges and texture are made stronger
SHARP = 1.5  # the same once more, for telling a clear thing from a blob
BLUR = 0.05  # share of a template: what is finer than this is edges and texture

Window = tuple[float, float, float]  # centre x, centre y, side of the object: px of 128


@dataclass(frozen=True)
class Background:
    """The background of an image: its colour, the nearest of the twelve named colours and the distance to it."""

    rgb: tuple[float, float, float]  # 0..255
    colour: str
    distance: float  # RGB, 0..442
    share: float = 1.0  # of the pixels, that have this colour: near 1 on a plain background, near 0 on noise


@dataclass(frozen=True)
class Verdict:
    """The judge's result: the background, and look-alike classes with their match in [0, 1], the likeliest first."""

    background: Background
    guesses: tuple[EmojiObject, ...]  # the best-matching object of each class
    matches: tuple[float, ...]
    window: Window  # where the first guess fits best
    clear: float  # [0, 1]: agreement of the first guess, above all in edges and texture

    @property
    def match(self) -> float:
        """Whether there is one clear object on a plain background: near 1 on a scene, low on blobs, near 0 on noise."""
        return self.clear * self.background.share

    def rank(self, thing: EmojiObject) -> int:
        """Place of an object's class among the guesses, from 0; the number of guesses where it is not among them."""
        classes = [guess.lookalike_class for guess in self.guesses]
        return classes.index(thing.lookalike_class) if thing.lookalike_class in classes else len(classes)


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image or uint8 (H, W, 3) array as uint8 (128, 128, 3). Raises DataError for anything else."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"expected uint8 (H, W, 3), got {image.dtype} {image.shape}", where="judge")
        image = Image.fromarray(image)
    if image.size != (FRAME, FRAME):
        image = image.convert("RGB").resize((FRAME, FRAME), Image.Resampling.LANCZOS)
    return np.asarray(image.convert("RGB"))


def background_of(pixels: np.ndarray) -> Background:
    """The background's colour, from the commonest colour along the border of uint8 (128, 128, 3)."""
    ring = np.ones(pixels.shape[:2], bool)
    ring[RING:-RING, RING:-RING] = False
    return commonest(pixels[ring])


def commonest(colours: np.ndarray) -> Background:
    """The commonest colour among (n, 3) pixels: the fullest cell of a coarse histogram, then the median near it."""
    values = colours.astype(np.float32)
    cells, counts = np.unique((colours // 32).astype(np.int64) @ (64, 8, 1), return_counts=True)
    fullest = cells[counts.argmax()]
    middle = (np.array((fullest // 64, fullest // 8 % 8, fullest % 8)) + 0.5) * 32
    for _ in range(3):
        close = values[((values - middle) ** 2).sum(1) <= SAME**2]
        middle = np.median(close, axis=0) if len(close) else middle
    rgb = tuple(float(v) for v in middle)
    name = nearest_colour(rgb)
    return Background(rgb, name, float(np.linalg.norm(middle - COLOURS[name])), len(close) / len(values))


def around(x: float, y: float, sizes: Iterable[float], right: Iterable[float], down: Iterable[float]) -> list[Window]:
    """Windows of all sizes at all displacements from (x, y)."""
    return [(x + dx, y + dy, size) for size in sizes for dy in down for dx in right]


class Judge:
    """All sprites as templates; it takes about a second to set up. `shared_judge()` returns a shared one.

    Raises DataError where the font is missing.
    """

    def __init__(self, font: str | Path | None = None):
        path = find_font(font)
        self.objects = objects()
        side = round(FRAME / MARGIN)
        fine = np.stack([_template(np.asarray(scaled(o.char, side, path))) for o in self.objects])  # (K, 64, 64, 4)
        coarse = fine.reshape(-1, COARSE, 2, COARSE, 2, 4).mean((2, 4))
        self._coarse, self._fine = Templates(coarse), Templates(fine)
        classes = {name: i for i, name in enumerate(dict.fromkeys(o.lookalike_class for o in self.objects))}
        self.classes = np.array([classes[o.lookalike_class] for o in self.objects])  # (K,) number of the class

    def __call__(self, image: Image.Image | np.ndarray) -> Verdict:
        """Judge an image of one object on a plain background."""
        pixels = to_array(image)
        windows = around(FRAME / 2, FRAME / 2, SIZES, SHIFTS, SHIFTS)
        return self.judge_windows(pixels, background_of(pixels), windows)

    def judge_windows(self, pixels: np.ndarray, background: Background, windows: Sequence[Window]) -> Verdict:
        """The sprites that fit best in any of the windows of uint8 (128, 128, 3), on this background."""
        view = View(pixels, background)
        scores = self._coarse.match(view, windows)  # (W, K)
        best = scores.max(0)
        candidates = np.argsort(-best, kind="stable")[:CANDIDATES]
        scores = scores[:, candidates]
        of_the_first, of_any = scores.argmax(0)[: WINDOWS // 2], np.argsort(-scores.max(1), kind="stable")
        best_windows = [windows[i] for i in list(dict.fromkeys([*of_the_first.tolist(), *of_any.tolist()]))[:WINDOWS]]
        scores = self._fine.match(view, best_windows, candidates)  # (12, 40)
        best_window = scores.argmax(0)
        best -= AFTER
        best[candidates] = scores.max(0)
        last = np.argsort(-scores.max(0), kind="stable")[:FINALISTS]
        refined = {}
        for i in last:
            sprite, window = candidates[i], best_window[i]
            best[sprite], refined[sprite] = self._refine(view, sprite, best_windows[window], scores[window, i])
        return self._verdict(view, background, best, refined)

    def _refine(self, view: View, sprite: int, window: Window, score: float) -> tuple[float, Window]:
        """Improve size and place by one small step."""
        x, y, size = window
        step = size / 48
        tried = [*around(x, y, (size,), (-step, 0, step), (-step, 0, step)), (x, y, size * 0.97), (x, y, size * 1.03)]
        scores = self._fine.match(view, tried, np.array([sprite]))[:, 0]
        i = int(scores.argmax())
        return (float(scores[i]), tried[i]) if scores[i] > score else (float(score), window)

    def _verdict(self, view: View, background: Background, best: np.ndarray, refined: dict[int, Window]) -> Verdict:
        order = np.argsort(-best, kind="stable")
        _, first = np.unique(self.classes[order], return_index=True)
        ranked = order[np.sort(first)]
        matches = np.clip(np.where(best < -AFTER / 2, best + AFTER, best), 0, 1)[ranked]
        first, window = ranked[0], refined[ranked[0]]
        clear = float(np.clip(self._fine.clear(view, window, first), 0, 1))
        guesses = tuple(self.objects[i] for i in ranked)
        return Verdict(background, guesses, tuple(map(float, matches)), window, clear)


class View:
    """An image minus its background, of which windows can be cropped; outside the image there is background."""

    def __init__(self, pixels: np.ndarray, background: Background):
        self.background = np.array(background.rgb, np.float32) / 255
        wide = np.empty((2 * FRAME, 2 * FRAME, 3), np.uint8)
        wide[:] = np.round(background.rgb)
        wide[FRAME // 2 : -FRAME // 2, FRAME // 2 : -FRAME // 2] = pixels
        self._wide, self._background8 = Image.fromarray(wide), wide[0, 0].astype(np.float32)

    def crops(self, windows: Sequence[Window], cells: int) -> np.ndarray:
        """(W, cells, cells, 3) differences from the background."""
        seen = np.empty((len(windows), cells, cells, 3), np.float32)
        for i, (x, y, size) in enumerate(windows):
            half, shift = size * MARGIN / 2, FRAME / 2
            box = (x + shift - half, y + shift - half, x + shift + half, y + shift + half)
            seen[i] = self._wide.resize((cells, cells), Image.Resampling.BILINEAR, box=box)
        return (seen - self._background8) / 255


class Templates:
    """Templates at one resolution, (K, N, N, 4): premultiplied colour and coverage, in [0, 1]."""

    def __init__(self, templates: np.ndarray):
        self.cells = templates.shape[1]
        self.rows = features(templates)  # (K, F)

    def match(self, view: View, windows: Sequence[Window], chosen: np.ndarray | None = None) -> np.ndarray:
        """Agreement of each window with each sprite (W, K): 2<P, T> / (|P|² + |T|²), 1 for equal, about 0 for noise."""
        rows = self.rows if chosen is None else self.rows[chosen]
        return agreement(features(view.crops(windows, self.cells)), rows, view.background)

    def clear(self, view: View, window: Window, sprite: int) -> float:
        """Agreement of one window with one sprite where edges and texture weigh most."""
        crop_features = features(view.crops([window], self.cells))
        sharp = [
            features(r.reshape(1, -1, self.cells, self.cells).transpose(0, 2, 3, 1), SHARP)
            for r in (crop_features, self.rows[sprite])
        ]
        return float(agreement(*sharp, view.background)[0, 0])


def agreement(differences: np.ndarray, rows: np.ndarray, background: np.ndarray) -> np.ndarray:
    """2<P, T> / (|P|² + |T|²) of differences P (W, 3·N·N) from a background (3,) with templates (K, 4·N·N): (W, K)."""
    plane = rows.shape[1] // 4
    last = -np.einsum("wcp,c->wp", differences.reshape(len(differences), 3, plane), background)
    dot = np.concatenate([differences, last], axis=1) @ rows.T
    channels = rows.reshape(len(rows), 4, plane)
    on_background = channels[:, :3] - background[None, :, None] * channels[:, 3:]
    energy = np.einsum("kcp,kcp->k", on_background, on_background)
    return 2 * dot / ((differences**2).sum(1)[:, None] + energy[None] + 1e-6 * differences.shape[1])


def features(images: np.ndarray, detail: float = DETAIL) -> np.ndarray:
    """(n, N, N, C) → (n, C·N·N): each channel with its fine detail made stronger (a linear map of each channel)."""
    planes = np.array(images.transpose(0, 3, 1, 2), np.float32, order="C")
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
    """The judge, set up once for each process. Raises DataError where the font is missing."""
    return Judge(font)
