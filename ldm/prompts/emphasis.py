"""Emphasis with the arithmetic of A1111: (x) is 1.1, [x] is 1 / 1.1, (x:1.3) is 1.3, nested ones multiply.

A backslash makes the next bracket an ordinary character and is itself left out. A bracket that is not closed reaches to
the end. BREAK, in capitals, starts a new chunk of tokens.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import groupby
from typing import NamedTuple

from ldm.errors import ConfigError

EMPHASIS = ("original", "no_norm")  # A1111's names: whether the mean of the states is restored after weighting
ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0  # of either sign; beyond it is a slip of the hand, and the states overflow 16 bits
MAX_DEPTH = 100  # brackets inside each other

TOKEN = re.compile(r"\\[()\[\]\\]|\\|[()\[\]]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:")
ESCAPED = re.compile(r"\\([()\[\]\\]?)")
LINE_ENDS = re.compile(r"\r\n|\r|\n")
ALMOST = re.compile(  # weights as others write them: with a comma, and InvokeAI's (red)1.3, (red)++
    r"(?<!\\)\([^()\[\]]*:\s*\d+,\d+\s*\)|(?<!\\)\([^()\[\]]*\)(?:\d*\.\d+|\+{1,9}|-{2,9})(?![\w+-])"
)
BREAKS = re.compile(r"\bBREAK\b")
AND = re.compile(r"\bAND\b")


class Piece(NamedTuple):
    """A part of a prompt under one weight."""

    text: str
    weight: float


BREAK = Piece("BREAK", -1.0)  # known by identity


def plain_text(text: str) -> str:
    """The words that a text means, as a prompt has them: composed (NFC), on one line, without escaping backslashes.

    For captions: brackets in them carry no weight, so they are kept, escaped or not.
    """
    lines = filter(None, map(str.strip, LINE_ENDS.split(text)))
    return ESCAPED.sub(r"\1", unicodedata.normalize("NFC", " ".join(lines)))


def parse(prompt: str, where: str = "prompt") -> list[Piece]:
    """The pieces of a prompt without prompt editing (see `read`)."""
    return read(prompt, where)[0]


def read(prompt: str, where: str) -> tuple[list[Piece], list[str]]:
    """(the prompt's pieces in order, neighbours of equal weight joined; one line for each bracket that is not closed or
    has a weight behind it that is none).

    [Piece("", 1.0)] where there is no text. Prompt editing is resolved before. Raises ConfigError for a weight that is
    no number or is beyond MAX_WEIGHT, brackets nested more than MAX_DEPTH deep, and AND.
    """
    if AND.search(prompt):
        hint = "write 'and', or draw the parts as images of their own"
        raise ConfigError("AND (several prompts composed into one image) is not supported", where=where, hint=hint)
    prompt = unicodedata.normalize("NFC", prompt)
    parts: list[list] = []  # [text, weight]
    opened: dict[str, list[tuple[int, int]]] = {"(": [], "[": []}  # (index of the first piece inside, position)

    def close(bracket: str, factor: float) -> None:
        for piece in parts[opened[bracket].pop()[0] :]:
            piece[1] *= factor

    for match in TOKEN.finditer(prompt):
        token, number = match[0], match[1]
        if token[0] == "\\":
            parts.append([token[1:], 1.0])
        elif token in opened:
            opened[token].append((len(parts), match.start()))
            if len(opened["("]) + len(opened["["]) > MAX_DEPTH:
                raise ConfigError(f"brackets are nested more than {MAX_DEPTH} deep", where=where)
        elif number is not None and opened["("]:
            close("(", _number(number, where))
        elif token == ")" and opened["("]:
            close("(", ROUND)
        elif token == "]" and opened["["]:
            close("[", SQUARE)
        else:
            parts += _broken(token)
    unclosed = sorted(place for places in opened.values() for _, place in places)
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        while opened[bracket]:
            close(bracket, factor)
    lines = [f"the bracket at {prompt[place : place + 20]!r} is not closed" for place in unclosed]
    lines += [f"{match[0]!r:.60} is no weight: write (word:1.3)" for match in ALMOST.finditer(prompt)]
    return _joined(parts, where), lines


def _broken(text: str) -> list[list]:
    """Text as pieces of weight 1, with BREAK, less the spaces around it, as a piece of its own."""
    first, *others = BREAKS.split(text)
    pieces = [[first.rstrip() if others else first, 1.0]]
    for i, other in enumerate(others):
        other = other.lstrip()
        pieces += [[BREAK, 0.0], [other if i == len(others) - 1 else other.rstrip(), 1.0]]
    return pieces


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the weight {text!r:.40} is not a number", where=where, hint="write (word:1.3)") from None


def _joined(parts: list[list], where: str) -> list[Piece]:
    """Pieces without the empty ones, runs of one weight as one."""
    pieces: list[Piece] = []
    written = [(text, weight) for text, weight in parts if text]
    for (weight, breaks), run in groupby(written, lambda piece: (piece[1], piece[0] is BREAK)):
        texts = [text for text, _ in run]
        if breaks:
            pieces += texts
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise ConfigError(f"the weight {weight:g} of {texts[0]!r:.40} is beyond {MAX_WEIGHT:g}", where=where)
        pieces.append(Piece("".join(texts), weight))
    return pieces or [Piece("", 1.0)]
