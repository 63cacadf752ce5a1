"""Emoji in texts as their Unicode names, for models that were trained on words."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection

from ldm.data.emoji.table import EmojiObject, objects

JOINED = "\ufe0f"  # asks for a coloured glyph
MODIFIERS = "[\ufe0e\ufe0f\U0001f3fb-\U0001f3ff]*"  # forms and skin tones, which no name has


@functools.cache
def _pattern() -> tuple[re.Pattern[str], dict[str, EmojiObject]]:
    table = {char: thing for thing in objects() for char in (thing.char, thing.char.replace(JOINED, ""))}
    longest = sorted((char for char in table if not char.isascii()), key=len, reverse=True)
    return re.compile(rf"({'|'.join(map(re.escape, longest))}){MODIFIERS}"), table


def with_names(text: str, known: Collection[str]) -> tuple[str, dict[str, str]]:
    """(the text with the name in the place of each emoji that is not in `known`, emoji -> name of those).

    An emoji without a name in the package stays.
    """
    pattern, table = _pattern()
    named: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        if match[1] in known:
            return match[0]
        named[match[1]] = table[match[1]].name
        before, after = text[: match.start()][-1:], text[match.end() :][:1]
        after = "" if pattern.match(text, match.end()) else after  # the next name brings its own space
        return f"{_gap(before, ' ')}{named[match[1]]}{_gap(after, ' ,.;:!?)')}"

    return pattern.sub(name, text), named


def _gap(neighbour: str, close: str) -> str:
    """A space where a word would run into its neighbour."""
    return "" if not neighbour or neighbour.isspace() or neighbour in close else " "
