"""Captions of scenes: articles, word order, synonyms. Lower case, under 30 words.

Templates hold {np}, {a}, {b} for objects with their articles, {c} for a colour and {g} for the words about the
background. Each has its weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ldm.data.emoji.colours import COLOURS
from ldm.data.emoji.draws import Draw
from ldm.data.emoji.table import EmojiObject, Word, objects

FIRST = 0.65  # share of an object's commonest word, where it has several

ARTICLES = {  # by kind of word; "A" becomes a or an
    "count": {"A": 0.78, "the": 0.07, "": 0.11, "one": 0.04},
    "single": {"A": 0.78, "the": 0.07, "": 0.15},
    "plural": {"": 0.7, "some": 0.22, "the": 0.08},
    "mass": {"": 0.75, "some": 0.17, "the": 0.08},
    "unique": {"the": 0.8, "": 0.2},
}
PREFIXES = {"": 0.88, "a picture of": 0.04, "a drawing of": 0.03, "an image of": 0.03, "a photo of": 0.02}
BACKGROUNDS = {
    "a {c} background": 0.6,
    "{c}": 0.12,
    "a plain {c} background": 0.08,
    "a {c} ground": 0.08,
    "the {c} background": 0.06,
    "{c} background": 0.06,
}
WITH_BACKGROUND = {  # {s}: the words about the objects
    "{s} on {g}": 0.7,
    "{s}, {c} background": 0.1,
    "{s} in front of a {c} background": 0.06,
    "{s} against a {c} background": 0.04,
    "a {c} background with {s}": 0.06,
    "{c} background, {s}": 0.04,
}
RELATIONS = {
    "left": {"{a} to the left of {b}": 0.5, "{a} left of {b}": 0.3, "{a} on the left and {b} on the right": 0.2},
    "right": {"{a} to the right of {b}": 0.5, "{a} right of {b}": 0.3, "{a} on the right and {b} on the left": 0.2},
    "above": {"{a} above {b}": 0.6, "{a} over {b}": 0.2, "{a} at the top and {b} at the bottom": 0.2},
    "below": {"{a} below {b}": 0.5, "{a} under {b}": 0.3, "{a} at the bottom and {b} at the top": 0.2},
    "and": {"{a} and {b}": 0.85, "{a} with {b}": 0.15},
}
CASUAL = {  # as people type one object: {w} the word, {p} its plural or the word, {a} the word with a or an
    "{w}": 0.2,
    "{p}": 0.17,
    "{a}": 0.05,
    "photo of {a}": 0.08,
    "a photo of {a}": 0.08,
    "photo of {p}": 0.03,
    "a photo of {p}": 0.03,
    "picture of {a}": 0.03,
    "{w} photo": 0.01,
    "my {w}": 0.12,
    "a photo of my {w}": 0.02,
    "{j} {w}": 0.08,
    "a {j} {w}": 0.08,
    "{j} {p}": 0.02,
}
ADJECTIVES = {"cute": 0.6, "little": 0.1, "small": 0.05, "big": 0.05, "nice": 0.05, "funny": 0.05, "beautiful": 0.1}
NUMBERS = {2: {"two": 0.8, "2": 0.2}, 3: {"three": 0.8, "3": 0.2}, 4: {"four": 0.8, "4": 0.2}}
SHAPES = {"card": {"card": 0.8, "square": 0.2}, "disc": {"disc": 0.5, "circle": 0.5}}
ON_CARD = "{np} on a {c} {shape}"
SPELLINGS = {"gray": {"gray": 0.6, "grey": 0.4}}

_AN = re.compile(r"(?!uni|uf|eu|ewe|one|us|ut)[aeiou]|8|hour|x-|xmas|suv")


def article(word: str) -> str:
    """ "a" or "an", by sound."""
    return "an" if _AN.match(word) else "a"


def colour_word(draw: Draw, colour: str) -> str:
    """The colour's name in one of its spellings."""
    return draw.weighted(SPELLINGS[colour]) if colour in SPELLINGS else colour


def _choose(draw: Draw, forms: Sequence[Word]) -> Word:
    return forms[0] if len(forms) == 1 or draw.chance(FIRST) else draw.pick(forms[1:])


def noun_phrase(draw: Draw, thing: EmojiObject) -> str:
    """One object with its article: "a cat", "the kitty", "cat", "some grapes"."""
    form = _choose(draw, thing.forms)
    before = draw.weighted(ARTICLES[form.kind])
    if before == "A":
        before = article(form.text)
    return f"{before} {form.text}" if before else form.text


def casual(draw: Draw, thing: EmojiObject) -> str:
    """One object as people type it: "cute puppy", "my bike", "photo of a fox", "penguins"."""
    form, text = _choose(draw, thing.forms), draw.weighted(CASUAL)
    if form.kind in ("mass", "plural"):
        text = text.replace("a {j}", "{j}")
    one = {"plural": "", "mass": "", "unique": "the"}.get(form.kind, article(form.text))
    text = text.replace("{a}", f"{one} {{w}}".strip()).replace("{p}", form.plural or form.text)
    text = text.replace("{w}", form.text)
    return text.replace("{j}", draw.weighted(ADJECTIVES)) if "{j}" in text else text


def _fill(draw: Draw, template: str, colour: str) -> str:
    """Replace {c}, and correct the article before it: "an orange background"."""
    colour = colour_word(draw, colour)
    text = template.replace("{c}", colour)
    return re.sub(rf"\ba (?={colour}\b)", "an ", text) if article(colour) == "an" else text


def with_background(draw: Draw, phrase: str, colour: str | None, prefixes: bool = True) -> str:
    """The words about the objects, then those about the background; colour None leaves the background out.

    prefixes: whether "a picture of" or the like may come first; a casual phrase has its own.
    """
    if colour is None:
        prefix = draw.weighted(PREFIXES) if prefixes else ""
        return f"{prefix} {phrase}".strip()
    template = draw.weighted(WITH_BACKGROUND)
    if template.startswith("{s}") and prefixes:
        phrase = f"{draw.weighted(PREFIXES)} {phrase}".strip()
    head, _, tail = template.partition("{s}")
    tail = tail.replace("{g}", draw.weighted(BACKGROUNDS)) if "{g}" in tail else tail
    return _fill(draw, head, colour) + phrase + _fill(draw, tail, colour)


def pair(draw: Draw, relation: str, a: EmojiObject, b: EmojiObject) -> str:
    """Two objects and the place of the first."""
    template = draw.weighted(RELATIONS[relation])
    of_a, of_b = noun_phrase(draw, a), noun_phrase(draw, b)
    return template.replace("{a}", of_a).replace("{b}", of_b)


def several(draw: Draw, thing: EmojiObject, count: int) -> str:
    """Two, three or four of a countable object."""
    return f"{draw.weighted(NUMBERS[count])} {_choose(draw, thing.countable).plural}"


def on_card(draw: Draw, thing: EmojiObject, shape: str, colour: str) -> str:
    """An object on a coloured card or disc."""
    phrase = noun_phrase(draw, thing)
    after = _fill(draw, ON_CARD.partition("{np}")[2], colour)
    return phrase + after.replace("{shape}", draw.weighted(SHAPES[shape]))


def vocabulary() -> frozenset[str]:
    """Every word that a caption can hold, in lower case, split at spaces and commas."""
    texts = list(COLOURS) + [s for names in SPELLINGS.values() for s in names] + ["a", "an", ON_CARD]
    for table in (
        PREFIXES,
        BACKGROUNDS,
        WITH_BACKGROUND,
        *ARTICLES.values(),
        *RELATIONS.values(),
        *NUMBERS.values(),
        *SHAPES.values(),
        CASUAL,
        ADJECTIVES,
    ):
        texts += list(table)
    for thing in objects():
        texts += [text for form in thing.forms for text in (form.text, form.plural or "")]
    return frozenset(w for text in texts for w in re.split(r"[ ,]+", re.sub(r"\{\w+\}|\bA\b", "", text)) if w)
