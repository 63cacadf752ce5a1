"""Judging pairs, counts and cards: the judge of single objects, applied where objects are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.emoji import layout
from ldm.evaluation.judge import FRAME, SAME, Background, Judge, Verdict, around, background_of, commonest
from ldm.evaluation.lists import Prompt

H, T = FRAME / 2, FRAME / 3
Box = tuple[float, float, float, float]  # left, top, right, bottom: px

SIDES: dict[str, Box] = {
    "left": (0, 0, H, FRAME),
    "right": (H, 0, FRAME, FRAME),
    "above": (0, 0, FRAME, H),
    "below": (0, H, FRAME, FRAME),
}
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_ROW: list[Box] = [(i * T, 0, (i + 1) * T, FRAME) for i in range(3)]
_QUARTERS: list[Box] = [(x, y, x + H, y + H) for y in (0, H) for x in (0, H)]
LAYOUTS: tuple[tuple[Box, ...], ...] = (  # where several of the same may stand; the first is one alone
    ((0, 0, FRAME, FRAME),),
    (SIDES["left"], SIDES["right"]),
    (SIDES["above"], SIDES["below"]),
    (SIDES["above"], *_QUARTERS[2:]),
    (*_QUARTERS[:2], SIDES["below"]),
    tuple(_ROW),
    tuple(_QUARTERS),
)
SMALL_SIZES, ROW_SIZES, ALONE_SIZES = (43, 49, 54), (34, 38), (90, 102)


@dataclass(frozen=True)
class Arrangement:
    """What an image of several objects shows: its background, and the verdict at each object's place, in prompt order.

    `number` is the number of equal objects (counts), `cards` the colours under the objects (cards).
    """

    background: Background
    verdicts: tuple[Verdict, ...]
    ranks: tuple[int, ...]
    number: int | None = None
    cards: tuple[str, ...] = ()

    def matches_prompt(self, prompt: Prompt, within: int = 1) -> bool:
        """Whether the image shows all that the prompt asks for, each object among the first `within` guesses."""
        objects = all(rank < within for rank in self.ranks)
        if prompt.family == "count":
            return objects and self.number == int(prompt.detail)
        return objects and (prompt.family != "card" or self.cards == tuple(prompt.detail.split(",")))

    @property
    def match(self) -> float:
        """The lowest match of its objects: near 1 on a drawn scene, near 0 on noise."""
        return min(v.clear for v in self.verdicts) * self.background.share


def judge_arrangement(judge: Judge, pixels: np.ndarray, prompt: Prompt) -> Arrangement:
    """Judge uint8 (128, 128, 3) against a prompt for a pair, a count or cards."""
    background = background_of(pixels)
    if prompt.family == "pair":
        return _pair(judge, pixels, background, prompt)
    if prompt.family == "count":
        return _count(judge, pixels, background, prompt)
    return _cards(judge, pixels, background, prompt)


def _cell(judge: Judge, pixels: np.ndarray, background: Background, box: Box, sizes: Sequence[float]) -> Verdict:
    """The object in a part of the image; the rest counts as background."""
    left, top, right, bottom = (round(v) for v in box)
    only = np.empty_like(pixels)
    only[:] = np.round(background.rgb)
    only[top:bottom, left:right] = pixels[top:bottom, left:right]
    mean_size = np.mean(sizes)
    reach = [max(4.0, min(10.0, (side - mean_size) / 2)) for side in (right - left, bottom - top)]
    shifts = [np.linspace(-r, r, 2 * int(np.ceil(r / 3.5)) + 1).tolist() for r in reach]
    return judge.judge_windows(only, background, around((left + right) / 2, (top + bottom) / 2, sizes, *shifts))


def _pair(judge: Judge, pixels: np.ndarray, background: Background, prompt: Prompt) -> Arrangement:
    """Each object in the half where it belongs; for "and", any of the four arrangements is right."""
    sides = tuple(SIDES) if prompt.detail == "and" else (prompt.detail,)
    verdicts: dict[str, Verdict] = {}
    for side in (s for first in sides for s in (first, OPPOSITE[first])):
        if side not in verdicts:
            verdicts[side] = _cell(judge, pixels, background, SIDES[side], SMALL_SIZES)
    splits = [(verdicts[side], verdicts[OPPOSITE[side]]) for side in sides]
    return _best([Arrangement(background, split, _ranks(split, prompt)) for split in splits])


def _ranks(verdicts: Sequence[Verdict], prompt: Prompt) -> tuple[int, ...]:
    return tuple(v.rank(thing) for v, thing in zip(verdicts, prompt.objects))


def _best(splits: Sequence[Arrangement]) -> Arrangement:
    """The best-fitting split of an image; of equal ones the nearest to the prompt.

    A split through the middle of an object leaves halves that fit nothing well.
    """
    fits = [np.mean([v.matches[0] for v in split.verdicts]) for split in splits]
    likely = [split for split, fit in zip(splits, fits) if fit > max(fits) - 1e-6]
    return min(likely, key=lambda split: (sum(split.ranks), max(split.ranks)))


def _count(judge: Judge, pixels: np.ndarray, background: Background, prompt: Prompt) -> Arrangement:
    """The layout in whose cells one object fits best on average: that object, and the number of cells."""
    verdicts: dict[Box, Verdict] = {}
    best = (-1.0, LAYOUTS[0], "")
    for cells in LAYOUTS:
        sizes = ALONE_SIZES if len(cells) == 1 else ROW_SIZES if cells == LAYOUTS[5] else SMALL_SIZES
        total: dict[str, float] = {}
        for box in cells:
            if box not in verdicts:
                verdicts[box] = _cell(judge, pixels, background, box, sizes)
            for guess, match in zip(verdicts[box].guesses, verdicts[box].matches):
                total[guess.lookalike_class] = total.get(guess.lookalike_class, 0.0) + match / len(cells)
        kind = max(total, key=total.get)
        best = max(best, (total[kind], cells, kind), key=lambda fit: fit[0])
        if cells == best[1]:
            ranks = sorted(total, key=total.get, reverse=True)
            rank = ranks.index(prompt.objects[0].lookalike_class)
    cell_verdicts = tuple(verdicts[box] for box in best[1])
    return Arrangement(background, cell_verdicts, (rank,), number=len(best[1]))


def _cards(judge: Judge, pixels: np.ndarray, background: Background, prompt: Prompt) -> Arrangement:
    """Each object on its card; two cards may have any of the four arrangements."""
    if len(prompt.objects) == 1:
        verdict, colour = _card(judge, pixels, background, (0, 0, FRAME, FRAME))
        return Arrangement(background, (verdict,), _ranks((verdict,), prompt), cards=(colour,))
    cards = {side: _card(judge, pixels, background, box) for side, box in SIDES.items()}
    splits = []
    for side in SIDES:
        split = (cards[side], cards[OPPOSITE[side]])
        verdicts = tuple(verdict for verdict, _ in split)
        splits.append(
            Arrangement(background, verdicts, _ranks(verdicts, prompt), cards=tuple(colour for _, colour in split))
        )
    return _best(splits)


def _card(judge: Judge, pixels: np.ndarray, background: Background, box: Box) -> tuple[Verdict, str]:
    """The object on the one card in a part of the image, and the card's colour."""
    left, top, right, bottom = (round(v) for v in box)
    part = np.zeros(pixels.shape[:2], bool)
    part[top:bottom, left:right] = (
        np.linalg.norm(pixels[top:bottom, left:right].astype(np.float32) - background.rgb, axis=2) > SAME
    )
    if part.sum() < 64:  # no card: judge the part as it is
        return _cell(judge, pixels, background, box, SMALL_SIZES), background.colour
    x, y, side = _extent(part)
    inner = side * layout.CARD_SHARE
    down, along = np.mgrid[: len(pixels), : len(pixels)] + 0.5
    inside = (abs(along - x) < inner / 2 + 1) & (abs(down - y) < inner / 2 + 1)
    rim = part & ~inside
    card = commonest(pixels[rim if rim.sum() >= 16 else part])
    only = np.empty_like(pixels)
    only[:] = np.round(card.rgb)
    only[inside] = pixels[inside]
    sizes = [inner * k for k in (0.92, 0.97, 1.02, 1.07)]
    return judge.judge_windows(only, card, around(x, y, sizes, (-3, 0, 3), (-3, 0, 3))), card.colour


def _extent(part: np.ndarray) -> tuple[float, float, float]:
    """Centre and side of the square that holds nearly all pixels of a mask."""
    spans = []
    for axis in (0, 1):
        filled = np.flatnonzero(part.sum(axis) > 0.12 * part.sum(axis).max())
        spans.append((filled[0], filled[-1] + 1))
    (left, right), (top, bottom) = spans
    return (left + right) / 2, (top + bottom) / 2, float(max(right - left, bottom - top))
