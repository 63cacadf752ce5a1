"""One line of text of a prompt file as (word, value) pairs: plain, A1111's flags, kohya's flags."""

from __future__ import annotations

import re
from typing import Any

from ldm.errors import ConfigError
from ldm.render.prompts.line_settings import REFUSED, WORDS, find_word, suggest_word

FLAG = re.compile(r"(?<!\S)--([^\W\d_]\S*)")  # what looks like a flag: letters right after two dashes
# `—steps`, as editors and phones correct `--steps`, and `-steps 30`
ALMOST = re.compile(r"(?<!\S)(?:([—–―])([^\W\d_][\w-]*)(?=[\s=]|$)|(-)([^\W\d_][\w-]*)(?=[\s=]+[\d.]))")
FIELDS = re.compile(r"\s*(Negative prompt:|Steps: ?\d+, )")
_DOUBLE = re.compile(r'\s*"((?:[^"\\]|\\.)*)"(?=\s+--|\s*$)', re.DOTALL)
_SINGLE = re.compile(r"\s*'([^']*)'(?=\s+--|\s*$)")


def pairs_of_text(line: str) -> list[tuple[str, Any]]:
    """`text --flag value …`. A value runs to the next flag, or stands in quotes; ` -- ` and apostrophes are text.

    A backslash before -- or a leading # makes them text.
    """
    _refuse_almost_flags(line)
    match = FLAG.search(line)
    head = line[: match.start() if match else None].strip()
    head = head[1:] if head.startswith("\\#") else head
    pairs: list[tuple[str, Any]] = [("prompt", _unescaped(head))] if head else []
    while match:
        word, equals, rest = match[1].partition("=")
        if find_word(word) is None:
            hint = f"{suggest_word(word[:80], '--')} write \\-- for text".strip()
            raise ConfigError(f"unknown flag --{word:.80}", where=f"--{word:.80}", hint=hint)
        start = match.end() - len(rest) if equals else match.end()
        quoted = _DOUBLE.match(line, start) or _SINGLE.match(line, start)
        match = FLAG.search(line, quoted.end() if quoted else start)
        value = line[start : match.start() if match else None].strip()
        if quoted:
            value = re.sub(r'\\(["\\])', r"\1", quoted[1]) if quoted.re is _DOUBLE else quoted[1]
        pairs.append((word, _flag_value(word, value if quoted else _unescaped(value), bool(quoted))))
    return pairs


def _refuse_almost_flags(line: str) -> None:
    """Raise ConfigError for what was meant for a flag, and for lines of an image's own text."""
    if FIELDS.match(line):
        hint = "give the whole text as a file of its own, or ldm render --from IMAGE"
        raise ConfigError("is a line of the settings that A1111 writes for one image, no prompt", hint=hint)
    for match in ALMOST.finditer(line):
        dash, word = match[1] or match[3], match[2] or match[4]
        if find_word(word) is not None:
            kind = "one dash" if dash == "-" else "a long dash"
            raise ConfigError(
                f"{dash}{word:.40} begins with {kind}", where=f"{dash}{word:.40}", hint=f"write --{word:.40}"
            )


def flags_in(text: str) -> list[str]:
    """What in a text looks like a flag that prompt lines know, with two dashes or a long one."""
    almost = [(match[1] or match[3], match[2] or match[4]) for match in ALMOST.finditer(text)]
    found = [("--", match[1].partition("=")[0]) for match in FLAG.finditer(text)] + almost
    return [f"{dash}{word}" for dash, word in found if find_word(word) is not None]


def _flag_value(word: str, value: str, quoted: bool) -> str:
    """The value of a flag; only texts and switches may be empty."""
    name = find_word(word)
    if not value and not quoted and name not in REFUSED and WORDS[name] != "negative_prompt":
        raise ConfigError(f"--{word} has no value", where=f"--{word}")
    return value


def _unescaped(text: str) -> str:
    return re.sub(r"(?<!\S)\\--", "--", text)
