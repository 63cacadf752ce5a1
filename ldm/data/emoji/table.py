"""The 849 objects that scenes are made of: their characters, names, words and look-alikes, from `table.tsv`.

`make_table.py` made that file and tells how objects and words were chosen.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources

from ldm.errors import DataError, nearest

KINDS = {"+": "plural", "~": "mass", "^": "unique", "!": "single"}  # markers of `table.tsv`; none means "count"


@dataclass(frozen=True)
class Word:
    """One thing that captions may call an object."""

    text: str  # lower case
    kind: str  # "count" | "single" (no plural) | "plural" (grapes) | "mass" (bread) | "unique" (the earth)
    plural: str | None  # only of "count"


@dataclass(frozen=True, eq=False)  # one instance an object: compared by identity, which keeps drawing fast
class EmojiObject:
    """One thing that can be drawn."""

    codepoints: str  # "1F408"; several are joined by "-"
    char: str
    name: str  # CLDR's short name
    group: str
    subgroup: str
    everyday: bool
    looks: str  # name of the look-alike class
    forms: tuple[Word, ...]  # the commonest first
    keywords: tuple[str, ...]  # CLDR's, not used in captions

    @property
    def word(self) -> str:
        """What people call it: "car" for the object named automobile."""
        return self.forms[0].text

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """All its names in the singular (or as they are, where there is none): the commonest first, CLDR's included."""
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
    codepoints, name, group, subgroup, everyday, looks, words, keywords = line.split("\t")
    char = "".join(chr(int(c, 16)) for c in codepoints.split())
    return EmojiObject(
        codepoints=codepoints.replace(" ", "-"),
        char=char,
        name=name,
        group=group,
        subgroup=subgroup,
        everyday=everyday == "1",
        looks=looks,
        forms=tuple(map(read_word, words.split("|"))),
        keywords=tuple(keywords.split("|")),
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
    if found := index.get(key) or index.get(key.lower()):
        return found
    close = nearest(key, [o.word for o in objects()])
    raise DataError(f"no object is called {key!r}", todo=close if close.startswith("did") else None)


def class_of(char: str) -> str:
    """The look-alike class of a character (or word): equal for cat and cat face, for all 24 clock faces."""
    return find(char).looks


def lookalikes() -> dict[str, tuple[EmojiObject, ...]]:
    """Objects by look-alike class, classes of one included."""
    classes: dict[str, list[EmojiObject]] = {}
    for o in objects():
        classes.setdefault(o.looks, []).append(o)
    return {name: tuple(members) for name, members in classes.items()}
