"""What sheets of images share: text and images that fit their places."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image
from PIL.ImageDraw import ImageDraw
from PIL.ImageFont import FreeTypeFont

from ldm.images import flatten

Source = Image.Image | str | os.PathLike | None  # an image, its file, or nothing to show
INK, PAPER, EMPTY = (30, 30, 30), (255, 255, 255), (225, 225, 225)
MOST = 1000  # characters of a text that are read
SPACING = 1.3  # line heights


def wrapped(text: str, font: FreeTypeFont, width: float, lines: int) -> list[str]:
    """`text` in at most so many lines of `width` pixels; one that is cut ends in …"""
    words = text[:MOST].split()
    done, line = [], ""
    for number, word in enumerate(words):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if len(done) == lines - 1:
            return [*done, cut(" ".join([line, *words[number:]]).strip(), font, width)]
        done += [line] if line else []
        line = word if font.getlength(word) <= width or len(done) == lines - 1 else cut(word, font, width)
        if font.getlength(line) > width:
            return [*done, cut(" ".join([line, *words[number + 1 :]]), font, width)]
    done += [line] if line else []
    return done if len(text) <= MOST or not done else [*done[:-1], cut(f"{done[-1]}…", font, width)]


def cut(text: str, font: FreeTypeFont, width: float) -> str:
    """The beginning of `text` that fits, with … behind it where something is missing."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(f"{text[:middle]}…") <= width else (low, middle - 1)
    return f"{text[:low].rstrip()}…"


def write_lines(pen: ImageDraw, place: tuple[float, float], lines: Sequence[str], font: FreeTypeFont) -> None:
    """Lines below each other, the first one's left upper corner at `place`."""
    for number, line in enumerate(lines):
        pen.text((place[0], place[1] + number * line_height(font)), line, fill=INK, font=font)


def line_height(font: FreeTypeFont) -> int:
    """Pixels from one line to the next."""
    return round(font.size * SPACING)


def tile(source: Source, width: int, height: int) -> Image.Image | None:
    """An image that fits the place, made smaller if need be; None where there is none or it cannot be read."""
    if source is None:
        return None
    try:
        with Image.open(source) if isinstance(source, (str, os.PathLike)) else source.copy() as image:
            scale = min(1.0, width / image.width, height / image.height)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            flat = flatten(image)
            return flat.copy() if size == image.size else flat.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    except (OSError, ValueError, SyntaxError):
        return None
