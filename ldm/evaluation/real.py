"""True images of prompts, drawn like the training scenes: the images of a perfect model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldm.data.emoji import COLOURS, Card, Placed, SceneConfig, Spec, find_font, render
from ldm.data.emoji import layout as places
from ldm.data.emoji.draws import Draw
from ldm.evaluation.lists import Prompt

MIDDLE = places.FRAME // 2
BESIDE = ("left", "right", "above", "below")


def real_images(prompts: Sequence[Prompt], seeds: Sequence[int], font: str | Path | None = None) -> list[np.ndarray]:
    """A true image of each prompt: uint8 (128, 128, 3), a function of (prompt, seed). Raises DataError: no font."""
    return [render(_spec(prompt, seed), find_font(font)) for prompt, seed in zip(prompts, seeds)]


def _spec(prompt: Prompt, seed: int) -> Spec:
    draw, cards = Draw(seed, 0), ()
    colour = prompt.colour or draw.pick(tuple(COLOURS))
    if prompt.family == "pair":
        position = draw.pick(BESIDE) if prompt.detail == "and" else prompt.detail
        both = places.pair(draw, position, places.SMALL_SIZE)
        objects = [Placed(thing, *place) for thing, place in zip(prompt.objects, both)]
    elif prompt.family == "count":
        size, points = places.several(draw, int(prompt.detail))
        objects = [Placed(prompt.objects[0], *point, size) for point in points]
    elif prompt.family == "card":
        cards = _cards(draw, prompt)
        objects = [
            Placed(thing, card.x, card.y, round(card.size * places.CARD_SHARE))
            for thing, card in zip(prompt.objects, cards)
        ]
    else:
        defaults = SceneConfig()
        size = draw.integer(*defaults.size)
        objects = [Placed(prompt.objects[0], *places.jittered(draw, MIDDLE, MIDDLE, size, defaults.jitter), size)]
    return Spec(prompt.family, prompt.text, COLOURS[colour], colour, True, tuple(objects), cards=tuple(cards))


def _cards(draw: Draw, prompt: Prompt) -> list[Card]:
    colours = prompt.detail.split(",")
    if len(colours) == 2:
        sizes = (draw.integer(*places.TWO_CARDS_SIZE), draw.integer(*places.TWO_CARDS_SIZE))
        points = places.two(draw, draw.pick(BESIDE), sizes)
    else:
        sizes = (draw.integer(*places.CARD_SIZE),)
        points = (places.jittered(draw, MIDDLE, MIDDLE, sizes[0], SceneConfig().jitter),)
    return [
        Card(draw.pick(("card", "disc")), colour, *point, size) for colour, point, size in zip(colours, points, sizes)
    ]
