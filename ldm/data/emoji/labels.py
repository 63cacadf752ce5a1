"""What a caption says, as numbers that a linear reader of a text encoder's states can learn."""

from __future__ import annotations

import functools
from typing import NamedTuple

from ldm.data.emoji import captions
from ldm.data.emoji.colours import COLOURS
from ldm.data.emoji.draws import Draw
from ldm.data.emoji.holdout import held_out
from ldm.data.emoji.scenes import Spec
from ldm.data.emoji.table import EmojiObject, common, everyday, objects

UNSAID = -100  # the label that torch's cross_entropy leaves out
SIDES = ("left", "right", "above", "below")


class Labels(NamedTuple):
    """What a caption says. A number counts within its kind; UNSAID where there is nothing to read."""

    object: int = UNSAID  # of a single thing or several alike: its place in objects()
    colour: int = UNSAID  # the background's place in COLOURS, or one more where the caption does not name it
    first: int = UNSAID  # of a pair: the object on the left or above
    last: int = UNSAID  # the object on the right or below
    axis: int = UNSAID  # 0: side by side, 1: one above the other
    count: int = UNSAID  # one less than the number of things alike


def label_sizes() -> Labels:
    """How many values each label has."""
    return Labels(len(objects()), len(COLOURS) + 1, len(objects()), len(objects()), 2, 4)


@functools.cache
def _places() -> dict[str, int]:
    return {thing.codepoints: place for place, thing in enumerate(objects())}


def _colour(name: str | None) -> int:
    return len(COLOURS) if name is None else list(COLOURS).index(name)


def labels_of(spec: Spec) -> Labels:
    """What the caption of a scene says."""
    colour = _colour(spec.colour if spec.mentioned else None)
    things = [placed.object for placed in spec.objects]
    if spec.kind == "pair" and spec.relation in SIDES:
        return _pair_labels(spec.relation, things[0], things[1], colour)
    if spec.kind in ("single", "count") or len(things) == 1:
        return Labels(_places()[things[0].codepoints], colour, count=len(things) - 1)
    return Labels(colour=colour)


def _pair_labels(relation: str, a: EmojiObject, b: EmojiObject, colour: int) -> Labels:
    first, last = (a, b) if relation in ("left", "above") else (b, a)
    axis = int(relation in ("above", "below"))
    return Labels(colour=colour, first=_places()[first.codepoints], last=_places()[last.codepoints], axis=axis)


def mirrored(seed: int, index: int, unseen: bool = False, everyday_only: bool = False) -> list[tuple[str, Labels]]:
    """Captions of two objects and where they are, and of the same with the objects exchanged; all else is equal.

    A pure function of its arguments. `unseen`: both combinations are held out from training, else neither is.
    """
    draw = Draw(seed, index)
    while True:
        pool = everyday() if everyday_only or draw.chance(0.4) else common() if draw.chance(0.5) else objects()
        a, b, relation = draw.pick(pool), draw.pick(pool), draw.pick(SIDES)
        kept = [held_out((relation, one.codepoints, other.codepoints)) for one, other in ((a, b), (b, a))]
        if a.lookalike_class != b.lookalike_class and kept == [unseen, unseen]:
            break
    colour = draw.pick(tuple(COLOURS)) if draw.chance(0.7) else None
    template = draw.weighted(captions.RELATIONS[relation])
    one, other = captions.noun_phrase(draw, a), captions.noun_phrase(draw, b)
    rest, found = draw.integer(0, 1 << 30), []
    for words, things in (((one, other), (a, b)), ((other, one), (b, a))):
        said = template.replace("{a}", words[0]).replace("{b}", words[1])
        text = captions.with_background(Draw(rest, 0), said, colour)
        found.append((text, _pair_labels(relation, *things, _colour(colour))))
    return found


def plain_words(spec: Spec) -> str:
    """The plain caption of a single thing in front of its background: "a cat on a teal background"."""
    (placed,) = spec.objects
    word = placed.object.forms[0]
    before = {"plural": "some", "mass": "some", "unique": "the"}.get(word.kind) or captions.article(word.text)
    said = f"{before} {word.text}"
    if not spec.mentioned or spec.colour is None:
        return said
    return f"{said} on {captions.article(spec.colour)} {spec.colour} background"
