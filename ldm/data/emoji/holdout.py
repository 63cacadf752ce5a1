"""The combinations that are never trained on: those whose canonical form has a sha256 divisible by 10.

A combination is one of
    ("on", object, colour)                      an object on a background of that colour
    ("left" | "right" | "above" | "below", a, b)    a is left of b, ...
    ("and", a, b)                               a and b, their places not named; also on two cards
    ("count", object, n)                        n = 2, 3 or 4 of one object
    ("card", object, colour)                    an object on a card or disc of that colour
with objects given by their code points ("1F408"). Changing anything here makes every score incomparable.
"""

from __future__ import annotations

import functools
import hashlib

Combination = tuple[str, str, str | int]

MIRRORED = {"right": "left", "below": "above"}


def canonical(combination: Combination) -> str:
    """The one way to write a combination: left and above only, unordered pairs sorted by code point.

    >>> canonical(("right", "1F408", "1F415")), canonical(("on", "1F408", "red"))
    ('1F415 left 1F408', '1F408 on red')
    """
    kind, a, b = combination
    if kind in MIRRORED:
        kind, a, b = MIRRORED[kind], b, a
    if kind == "and":
        a, b = sorted((a, b), key=lambda cps: [int(c, 16) for c in cps.split("-")])
    return f"{a} {kind} {b}"


@functools.lru_cache(maxsize=1 << 17)
def held_out(combination: Combination) -> bool:
    """Whether this combination is kept for judging."""
    digest = hashlib.sha256(canonical(combination).encode("utf-8")).hexdigest()
    return int(digest, 16) % 10 == 0
