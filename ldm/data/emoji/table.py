"""The 849 objects that scenes are made of: their characters, names, words and look-alikes, from `table.tsv`.

`tests/make_emoji_table.py` of the repository made that file and says how objects and words were chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from ldm.errors import DataError, nearest

KINDS = {"+": "plural", "~": "mass", "^": "unique", "!": "single"}  # markers in `table.tsv`; none means "count"


@dataclass(frozen=True)
class Word:
    """A word that captions use for an object."""

    text: str  # lower case
    kind: str  # "count" | "single" (no plural) | "plural" (grapes) | "mass" (bread) | "unique" (the earth)
    plural: str | None  # only of "count"


@dataclass(frozen=True, eq=False)  # one instance for each object: compared by identity, which is fast
class EmojiObject:
    """One object that can be drawn."""

    codepoints: str  # "1F408"; several are joined by "-"
    char: str
    name: str  # CLDR's short name
    group: str
    subgroup: str
    everyday: bool  # one of the 150 that people ask for first
    lookalike_class: str  # name of the class
    forms: tuple[Word, ...]  # the commonest first
    keywords: tuple[str, ...]  # CLDR's, not used in captions
    common: bool = False  # one of the about 300 that people really type; everyday ones are too

    @property
    def word(self) -> str:
        """The commonest word: "car" for the object named automobile."""
        return self.forms[0].text

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """All its words, in the singular where there is one, the commonest first; CLDR's name is among them."""
        return tuple(form.text for form in self.forms)

    @functools.cached_property
    def countable(self) -> tuple[Word, ...]:
        """The words that have a plural."""
        return tuple(form for form in self.forms if form.plural)


def regular_plural(word: str) -> str:
    """cat -> cats, box -> boxes, cherry -> cherries."""
    if word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def read_word(text: str) -> Word:
    """A word with its markers, as `table.tsv` writes it."""
    kind = KINDS.get(text[0], "count")
    text, _, plural = text.lstrip("".join(KINDS)).partition("/")
    if plural:
        return Word(text, "count", plural)
    return Word(text, kind, regular_plural(text) if kind == "count" else None)


def _read_row(line: str) -> EmojiObject:
    codepoints, name, group, subgroup, everyday, lookalike_class, words, keywords = line.split("\t")
    char = "".join(chr(int(c, 16)) for c in codepoints.split())
    return EmojiObject(
        codepoints=codepoints.replace(" ", "-"),
        char=char,
        name=name,
        group=group,
        subgroup=subgroup,
        everyday=everyday == "1",
        lookalike_class=lookalike_class,
        forms=tuple(map(read_word, words.split("|"))),
        keywords=tuple(keywords.split("|")),
        common=everyday in ("1", "2"),
    )


@functools.cache
def objects() -> tuple[EmojiObject, ...]:
    """All 849 objects, in Unicode's order."""
    text = resources.files(__package__).joinpath("table.tsv").read_text(encoding="utf-8")
    return tuple(map(_read_row, text.splitlines()[1:]))


@functools.cache
def everyday() -> tuple[EmojiObject, ...]:
    """The 150 objects that people ask for first."""
    return tuple(o for o in objects() if o.everyday)


@functools.cache
def common() -> tuple[EmojiObject, ...]:
    """The about 300 objects that people really type, the 150 everyday ones among them."""
    return tuple(o for o in objects() if o.common)


@functools.cache
def _index() -> dict[str, EmojiObject]:
    """Objects by character, code points and every word; singular words win over plurals (books, houses)."""
    index: dict[str, EmojiObject] = {}
    for o in objects():
        index |= {o.char: o, o.char.replace("\ufe0f", ""): o, o.codepoints: o, o.name: o}
        index |= dict.fromkeys(o.words, o)
    for o in objects():
        for form in o.countable:
            index.setdefault(form.plural, o)
    return index


def find(key: str) -> EmojiObject:
    """The object of a character, code points ("1F408"), name or word in singular or plural. Raises DataError."""
    index = _index()
    if match := index.get(key) or index.get(key.lower()):
        return match
    close = nearest(key, [o.word for o in objects()])
    raise DataError(f"no object is called {key!r}", hint=close if close.startswith("did") else None)


def class_of(char: str) -> str:
    """The look-alike class of a character (or word): equal for cat and cat face, for all 24 clock faces."""
    return find(char).lookalike_class


def lookalikes() -> dict[str, tuple[EmojiObject, ...]]:
    """Objects by look-alike class, classes of one included."""
    classes: dict[str, list[EmojiObject]] = {}
    for o in objects():
        classes.setdefault(o.lookalike_class, []).append(o)
    return {name: tuple(members) for name, members in classes.items()}
