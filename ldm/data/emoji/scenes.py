"""Endless images with captions, each a pure function of (seed, index)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.config import require
from ldm.data.emoji.colours import COLOURS, nearest_colour
from ldm.data.emoji.draws import Draw
from ldm.data.emoji.holdout import Combination, held_out
from ldm.data.emoji.sprites import find_font, scaled
from ldm.data.emoji.table import EmojiObject, common, everyday, find, objects
from ldm.errors import ConfigError, DataError, nearest

from . import captions, layout

if TYPE_CHECKING:
    import numpy as np

KINDS = ("single", "pair", "count", "card")
RENAMED = {  # old names of the settings `data.scenes`, which are still accepted
    "favourites": "oversampled",
    "favourites_share": "oversampled_share",
    "grounds": "backgrounds",
    "still": "fixed_layout",
}
ATTEMPTS = 100_000  # draws before giving up on a scene; a held-out one takes about 10, with two cards 100


@dataclass(frozen=True)
class SceneConfig:
    """What is drawn, and how often. Sizes and jitter are pixels of a 128 × 128 image. Raises ConfigError."""

    objects: Literal["everyday", "all"] = "everyday"
    everyday_share: float = 0.5  # with objects="all": how often an object is drawn from the everyday ones alone
    common_share: float = 0.0  # with objects="all": how often one of the rest is drawn from the about 300 common ones
    arranged: Literal["same", "everyday"] = "same"  # objects of pairs, counts and cards: as single ones, or everyday
    casual: float = 0.0  # share of single objects with captions as people type them ("cute puppy", "my bike", "owls")
    oversampled: tuple[str, ...] = ()  # words or characters of objects that are drawn more often, such as hard ones
    oversampled_share: float = 0.5  # how often an object is one of these, where there are any
    kinds: dict[str, float] = field(default_factory=lambda: {"single": 1.0})  # weights of single, pair, count, card
    size: tuple[int, int] = (88, 104)  # side of a single object
    jitter: int = 6  # a single object's centre is at most this far from the middle, and never leaves the image
    fixed_layout: float = 0.0  # share of scenes whose objects have one fixed place and size
    grid: int = 1  # steps of a single object's size and place: whole latents of an autoencoder of factor 8 with 8
    backgrounds: Literal["named", "any"] = "named"  # the twelve colours, or any colour (never said)
    mention: float = 0.85  # share of captions that name the background's colour
    two_cards: float = 0.5  # share of card scenes that have two
    resolution: int = 128
    held_out: bool = False  # True: only held-out combinations, for judging; captions always name the background

    def __post_init__(self):
        for kind, weight in self.kinds.items():
            if kind not in KINDS:
                raise ConfigError(f"unknown kind of scene {kind!r}", where="kinds", hint=nearest(kind, KINDS))
            require(weight >= 0, f"a weight cannot be negative, got {weight}", f"kinds.{kind}")
        require(sum(self.kinds.values()) > 0, "all weights are zero", "kinds")
        require(8 <= self.size[0] <= self.size[1] <= 128, f"needs 8 <= low <= high <= 128, got {self.size}", "size")
        require(0 <= self.jitter <= 128, f"must be 0 to 128, got {self.jitter}", "jitter")
        require(1 <= self.grid <= 128, f"must be 1 to 128, got {self.grid}", "grid")
        require(16 <= self.resolution <= 2048, f"must be 16 to 2048, got {self.resolution}", "resolution")
        for name in ("everyday_share", "common_share", "casual", "mention", "two_cards", "fixed_layout"):
            require(0 <= getattr(self, name) <= 1, f"must be 0 to 1, got {getattr(self, name)}", name)
        share = self.oversampled_share
        require(0 <= share < 1, f"must be 0 to less than 1, got {share}", "oversampled_share")
        try:
            _objects_of(self.oversampled)
        except DataError as error:
            raise ConfigError(error.what, where="oversampled", hint=error.hint) from None
        require(
            not (self.held_out and self.backgrounds == "any"), "held-out scenes need named backgrounds", "backgrounds"
        )


@dataclass(frozen=True)
class Placed:
    """One object of a scene; x, y is the centre, `size` the side of its square, in pixels of 128."""

    object: EmojiObject
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Card:
    """A coloured square with round corners, or a disc, behind the object of the same position in `Spec.objects`."""

    shape: str  # "card" | "disc"
    colour: str
    x: int
    y: int
    size: int


@dataclass(frozen=True)
class Spec:
    """Everything about a scene except its pixels."""

    kind: str  # "single" | "pair" | "count" | "card"
    caption: str
    background: tuple[int, int, int]
    colour: str | None  # the background's name; None where it has none
    mentioned: bool  # whether the caption names the background
    objects: tuple[Placed, ...]  # in the caption's order
    relation: str | None = None  # "left", "right", "above", "below", "and": the first object to the second
    cards: tuple[Card, ...] = ()
    combinations: tuple[Combination, ...] = ()  # all that the image shows
    judged: tuple[Combination, ...] = ()  # those that the caption is about


@dataclass(frozen=True)
class Scene:
    """An image, uint8 (resolution, resolution, 3), with its caption and its spec."""

    image: np.ndarray
    caption: str
    spec: Spec


class Scenes:
    """`scenes[i]` for any i >= 0; equal for equal (config, seed, i), in every process.

    `font` is the font's file, looked up when the first image is drawn, so that specs and captions need none.
    """

    def __init__(self, config: SceneConfig | None = None, seed: int = 0, font: str | Path | None = None):
        self.config, self.seed = config or SceneConfig(), seed
        self._arranged = replace(self.config, objects="everyday") if self.config.arranged == "everyday" else self.config
        self._font, self._path = font, None

    def spec(self, index: int) -> Spec:
        """Scene `index` without its pixels."""
        if index < 0:
            raise IndexError(f"scenes are counted from 0, got {index}")
        draw = Draw(self.seed, index)
        kind = draw.weighted(self.config.kinds)  # before any rejection, so that shares are kept
        for _ in range(ATTEMPTS):
            spec = BUILDERS[kind](draw, self.config if kind == "single" else self._arranged)
            if self._allowed(spec):
                return spec
        raise ConfigError("these settings leave nothing to draw", where="SceneConfig")

    def caption(self, index: int) -> str:
        """The caption of scene `index`."""
        return self.spec(index).caption

    def __getitem__(self, index: int) -> Scene:
        spec = self.spec(index)
        return Scene(self.draw(spec), spec.caption, spec)

    def draw(self, spec: Spec) -> np.ndarray:
        """The pixels of a spec, uint8 (resolution, resolution, 3). Raises DataError where the font is missing."""
        if self._path is None:
            self._path = find_font(self._font)
        return render(spec, self._path, self.config.resolution)

    def _allowed(self, spec: Spec) -> bool:
        if self.config.held_out:
            return all(map(held_out, spec.judged))
        return not any(map(held_out, spec.combinations))


def render(spec: Spec, font: Path, resolution: int = 128) -> np.ndarray:
    """Draw a spec: background, cards, objects."""
    import numpy as np
    from PIL import Image

    scale = resolution / layout.FRAME
    image = Image.new("RGB", (resolution, resolution), spec.background)
    for card in spec.cards:
        side = round(card.size * scale)
        mask = _card_mask(card.shape, side)
        image.paste(COLOURS[card.colour], (round(card.x * scale - side / 2), round(card.y * scale - side / 2)), mask)
    for placed in spec.objects:
        side = round(placed.size * scale)
        drawn = scaled(placed.object.char, side, font)
        image.paste(drawn, (round(placed.x * scale - side / 2), round(placed.y * scale - side / 2)), drawn)
    return np.array(image)


def _card_mask(shape: str, side: int):
    """Coverage of a card or disc, smooth at the edge: mode L, (side, side)."""
    from PIL import Image, ImageDraw

    big = 4 * side
    mask = Image.new("L", (big, big), 0)
    radius = big / 2 if shape == "disc" else big / 10
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, big - 1, big - 1), radius, fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _draw_background(draw: Draw, config: SceneConfig) -> tuple[tuple[int, int, int], str | None, bool]:
    """(rgb, name, whether the caption names it)."""
    if config.backgrounds == "any":
        return tuple(draw.integer(0, 255) for _ in range(3)), None, False
    colour = draw.pick(tuple(COLOURS))
    mentioned = draw.chance(config.mention) or config.held_out
    return COLOURS[colour], colour, mentioned


def _object(draw: Draw, config: SceneConfig, countable: bool = False) -> EmojiObject:
    while True:
        thing = draw.pick(_choice(draw, config))
        if thing.countable or not countable:
            return thing


def _choice(draw: Draw, config: SceneConfig) -> tuple[EmojiObject, ...]:
    """The objects to draw the next one from. Without oversampled ones no random number is used for that choice."""
    if config.oversampled and draw.chance(config.oversampled_share):
        return _objects_of(config.oversampled)
    if config.objects == "everyday" or draw.chance(config.everyday_share):
        return everyday()
    return common() if config.common_share and draw.chance(config.common_share) else objects()


@functools.cache
def _objects_of(words: tuple[str, ...]) -> tuple[EmojiObject, ...]:
    return tuple(map(find, words))


def _two_objects(draw: Draw, config: SceneConfig) -> tuple[EmojiObject, EmojiObject]:
    """Two objects that do not look alike."""
    a = b = _object(draw, config)
    while b.lookalike_class == a.lookalike_class:
        b = _object(draw, config)
    return a, b


def _finish(
    draw: Draw, config: SceneConfig, kind: str, phrase: str, background, placed, judged, shown=(), prefixes=True, **more
) -> Spec:
    """A spec; its caption names the background or not, and it lists every combination that the image shows."""
    rgb, colour, mentioned = background
    name = colour or nearest_colour(rgb)
    on_background = dict.fromkeys(("on", p.object.codepoints, name) for p in placed)
    return Spec(
        kind=kind,
        caption=captions.with_background(draw, phrase, colour if mentioned else None, prefixes),
        background=rgb,
        colour=colour,
        mentioned=mentioned,
        objects=tuple(placed),
        combinations=tuple(dict.fromkeys((*judged, *shown, *on_background))),
        judged=tuple(judged),
        **more,
    )


def _is_fixed(draw: Draw, config: SceneConfig) -> bool:
    """Whether a scene has the fixed layout. Without such scenes no random number is used, so that the others stay."""
    return bool(config.fixed_layout) and draw.chance(config.fixed_layout)


def _single(draw: Draw, config: SceneConfig) -> Spec:
    thing, background = _object(draw, config), _draw_background(draw, config)
    low, high = config.size
    size = low + config.grid * draw.integer(0, (high - low) // config.grid)
    middle = layout.FRAME // 2
    x, y = layout.jittered(draw, middle, middle, size, config.jitter, config.grid)
    if _is_fixed(draw, config):
        size, x, y = (low + high) // 2, middle, middle
    judged = [("on", thing.codepoints, background[1] or nearest_colour(background[0]))]
    typed = bool(config.casual) and draw.chance(config.casual)
    phrase = captions.casual(draw, thing) if typed else captions.noun_phrase(draw, thing)
    placed = [Placed(thing, x, y, size)]
    return _finish(draw, config, "single", phrase, background, placed, judged, prefixes=not typed)


def _pair(draw: Draw, config: SceneConfig) -> Spec:
    (a, b), background = _two_objects(draw, config), _draw_background(draw, config)
    relation = draw.pick(tuple(captions.RELATIONS))
    position = draw.pick(("left", "right", "above", "below")) if relation == "and" else relation
    places = layout.pair(draw, position, layout.SMALL_SIZE, _is_fixed(draw, config))
    placed = [Placed(thing, *place) for thing, place in zip((a, b), places)]
    judged = [(relation, a.codepoints, b.codepoints)]
    phrase = captions.pair(draw, relation, a, b)
    shown = [(position, a.codepoints, b.codepoints)]
    return _finish(draw, config, "pair", phrase, background, placed, judged, shown, relation=relation)


def _count(draw: Draw, config: SceneConfig) -> Spec:
    thing, background = _object(draw, config, countable=True), _draw_background(draw, config)
    count = draw.integer(2, 4)
    size, places = layout.several(draw, count, _is_fixed(draw, config))
    placed = [Placed(thing, x, y, size) for x, y in places]
    phrase = captions.several(draw, thing, count)
    return _finish(draw, config, "count", phrase, background, placed, [("count", thing.codepoints, count)])


def _card_colours(draw: Draw, background: tuple) -> tuple[str, str]:
    """Two different colours, neither of them the background's."""
    free = [c for c in COLOURS if c != (background[1] or nearest_colour(background[0]))]
    first = draw.pick(free)
    return first, draw.pick([c for c in free if c != first])


def _card(draw: Draw, config: SceneConfig) -> Spec:
    things, background = _two_objects(draw, config), _draw_background(draw, config)
    colours, middle = _card_colours(draw, background), layout.FRAME // 2
    both = draw.chance(config.two_cards)
    position = draw.pick(("left", "right", "above", "below"))
    fixed = _is_fixed(draw, config)
    if both:
        places = layout.pair(draw, position, layout.TWO_CARDS_SIZE, fixed)
    else:
        size = layout.side(draw, layout.CARD_SIZE, fixed)
        places = [(*layout.jittered(draw, middle, middle, size, 0 if fixed else config.jitter), size)]
    cards = tuple(Card(draw.pick(("card", "disc")), colour, *place) for colour, place in zip(colours, places))
    placed = [Placed(thing, card.x, card.y, round(card.size * layout.CARD_SHARE)) for thing, card in zip(things, cards)]
    judged = [("card", p.object.codepoints, card.colour) for p, card in zip(placed, cards)]
    phrase = " and ".join(captions.on_card(draw, p.object, c.shape, c.colour) for p, c in zip(placed, cards))
    pair = (things[0].codepoints, things[1].codepoints)
    shown = [("and", *pair), (position, *pair)] if both else []
    more = {"relation": "and" if both else None, "cards": cards}
    return _finish(draw, config, "card", phrase, background, placed, judged, shown, **more)


BUILDERS = dict(zip(KINDS, (_single, _pair, _count, _card)))
