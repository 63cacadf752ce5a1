"""Judging pairs, counts and cards: the single-object judge, looking at the places where things are expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldm.data.emoji import layout
from ldm.evaluation.judge import FRAME, Ground, Judge, Verdict, around, commonest, ground_of
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
PAIR_SIZES, COUNT_SIZES, ROW_SIZES, ALONE_SIZES = (46, 53, 60), (43, 49, 56), (34, 38), (90, 102)
CARD_PX = 24.0  # RGB distance from the ground from which a pixel may belong to a card


@dataclass(frozen=True)
class Found:
    """What an arranged picture shows: its ground, and in the prompt's order what was found where each object belongs.

    `number` is how many of the same there are (counts), `cards` the colours under the things (cards).
    """

    ground: Ground
    verdicts: tuple[Verdict, ...]
    ranks: tuple[int, ...]
    number: int | None = None
    cards: tuple[str, ...] = ()

    def right(self, prompt: Prompt, within: int = 1) -> bool:
        """Whether all that the prompt asks for was found, objects among the first `within` guesses."""
        objects = all(rank < within for rank in self.ranks)
        if prompt.family == "count":
            return objects and self.number == int(prompt.detail)
        return objects and (prompt.family != "card" or self.cards == tuple(prompt.detail.split(",")))

    @property
    def match(self) -> float:
        """The worst of the matches: near 1 on a drawn scene, near 0 on noise."""
        return min(v.clear for v in self.verdicts) * self.ground.share


def look_at(judge: Judge, pixels: np.ndarray, prompt: Prompt) -> Found:
    """Judge uint8 (128, 128, 3) by what the prompt asks for: a pair, a count or cards."""
    ground = ground_of(pixels)
    if prompt.family == "pair":
        return _pair(judge, pixels, ground, prompt)
    if prompt.family == "count":
        return _count(judge, pixels, ground, prompt)
    return _cards(judge, pixels, ground, prompt)


def _cell(judge: Judge, pixels: np.ndarray, ground: Ground, box: Box, sizes: Sequence[float]) -> Verdict:
    """The object in a part of the picture; the rest is taken for ground."""
    left, top, right, bottom = (round(v) for v in box)
    only = np.empty_like(pixels)
    only[:] = np.round(ground.rgb)
    only[top:bottom, left:right] = pixels[top:bottom, left:right]
    small = np.mean(sizes)
    reach = [max(4.0, min(10.0, (side - small) / 2)) for side in (right - left, bottom - top)]
    shifts = [np.linspace(-r, r, 2 * int(np.ceil(r / 3.5)) + 1).tolist() for r in reach]
    return judge.look(only, ground, around((left + right) / 2, (top + bottom) / 2, sizes, *shifts))


def _pair(judge: Judge, pixels: np.ndarray, ground: Ground, prompt: Prompt) -> Found:
    """Each object in the half where it belongs; for "and", any of the four arrangements will do."""
    stands = tuple(SIDES) if prompt.detail == "and" else (prompt.detail,)
    seen: dict[str, Verdict] = {}
    for side in (s for first in stands for s in (first, OPPOSITE[first])):
        if side not in seen:
            seen[side] = _cell(judge, pixels, ground, SIDES[side], PAIR_SIZES)
    ways = [(seen[side], seen[OPPOSITE[side]]) for side in stands]
    return _best([Found(ground, way, _ranks(way, prompt)) for way in ways])


def _ranks(verdicts: Sequence[Verdict], prompt: Prompt) -> tuple[int, ...]:
    return tuple(v.rank(thing) for v, thing in zip(verdicts, prompt.objects))


def _best(ways: Sequence[Found]) -> Found:
    """Of the ways of splitting a picture that fit it best, the one nearest to the prompt.

    A split through the middle of an object leaves halves that fit nothing well.
    """
    fits = [np.mean([v.matches[0] for v in way.verdicts]) for way in ways]
    likely = [way for way, fit in zip(ways, fits) if fit > max(fits) - 1e-6]
    return min(likely, key=lambda way: (sum(way.ranks), max(way.ranks)))


def _count(judge: Judge, pixels: np.ndarray, ground: Ground, prompt: Prompt) -> Found:
    """The layout in whose cells one object fits best, all cells together; that object, and the number of cells."""
    seen: dict[Box, Verdict] = {}
    best = (-1.0, LAYOUTS[0], "")
    for cells in LAYOUTS:
        sizes = ALONE_SIZES if len(cells) == 1 else ROW_SIZES if cells == LAYOUTS[5] else COUNT_SIZES
        total: dict[str, float] = {}
        for box in cells:
            if box not in seen:
                seen[box] = _cell(judge, pixels, ground, box, sizes)
            for guess, match in zip(seen[box].guesses, seen[box].matches):
                total[guess.looks] = total.get(guess.looks, 0.0) + match / len(cells)
        looks = max(total, key=total.get)
        best = max(best, (total[looks], cells, looks), key=lambda found: found[0])
        if cells == best[1]:
            ranks = sorted(total, key=total.get, reverse=True)
            place = ranks.index(prompt.objects[0].looks)
    verdicts = tuple(seen[box] for box in best[1])
    return Found(ground, verdicts, (place,), number=len(best[1]))


def _cards(judge: Judge, pixels: np.ndarray, ground: Ground, prompt: Prompt) -> Found:
    """Each thing on its card; two cards may stand in any of the four arrangements."""
    if len(prompt.objects) == 1:
        verdict, colour = _card(judge, pixels, ground, (0, 0, FRAME, FRAME))
        return Found(ground, (verdict,), _ranks((verdict,), prompt), cards=(colour,))
    seen = {side: _card(judge, pixels, ground, box) for side, box in SIDES.items()}
    ways = []
    for side in SIDES:
        way = (seen[side], seen[OPPOSITE[side]])
        verdicts = tuple(verdict for verdict, _ in way)
        ways.append(Found(ground, verdicts, _ranks(verdicts, prompt), cards=tuple(colour for _, colour in way)))
    return _best(ways)


def _card(judge: Judge, pixels: np.ndarray, ground: Ground, box: Box) -> tuple[Verdict, str]:
    """The thing on the one card inside a part of the picture, and the card's colour."""
    left, top, right, bottom = (round(v) for v in box)
    part = np.zeros(pixels.shape[:2], bool)
    part[top:bottom, left:right] = (
        np.linalg.norm(pixels[top:bottom, left:right].astype(np.float32) - ground.rgb, axis=2) > CARD_PX
    )
    if part.sum() < 64:  # no card: look at the part as it is
        return _cell(judge, pixels, ground, box, PAIR_SIZES), ground.colour
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
    return judge.look(only, card, around(x, y, sizes, (-3, 0, 3), (-3, 0, 3))), card.colour


def _extent(part: np.ndarray) -> tuple[float, float, float]:
    """Centre and side of the square that holds nearly all pixels of a mask."""
    spans = []
    for axis in (0, 1):
        filled = np.flatnonzero(part.sum(axis) > 0.12 * part.sum(axis).max())
        spans.append((filled[0], filled[-1] + 1))
    (left, right), (top, bottom) = spans
    return (left + right) / 2, (top + bottom) / 2, float(max(right - left, bottom - top))
