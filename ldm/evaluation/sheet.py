"""The contact sheet: every judged image in a green or red frame, with its prompt and the judge's guess."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ldm.evaluation.judged import Judged
from ldm.images import grid

SIDE, FRAME, TEXT, GAP, COLUMNS = 128, 4, 44, 6, 10  # px
RIGHT, WRONG, INK = (40, 150, 60), (205, 40, 40), (30, 30, 30)
FONT_SIZE, LINES, WIDTH = 10, 3, 27  # px, lines of text, letters in a line


def contact_sheet(images: Sequence[Image.Image | np.ndarray], judged: Sequence[Judged]) -> Image.Image:
    """Rows of ten images. Below each: its prompt, the guess, and the background where it is wrong."""
    return grid([_cell(image, verdict) for image, verdict in zip(images, judged)], COLUMNS, GAP)


def _cell(image: Image.Image | np.ndarray, judged: Judged) -> Image.Image:
    side = SIDE + 2 * FRAME
    good = (judged.first or not judged.prompt.objects) and judged.background_right is not False
    colour = RIGHT if good else WRONG
    cell = Image.new("RGB", (side, side + TEXT), "white")
    pen, font = ImageDraw.Draw(cell), ImageFont.load_default(FONT_SIZE)
    pen.rectangle((0, 0, side - 1, side - 1), fill=colour)
    tile = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    cell.paste(tile.convert("RGB").resize((SIDE, SIDE)), (FRAME, FRAME))
    for number, line in enumerate(_caption(judged)):
        corner = (0, side + 1 + number * (FONT_SIZE + 3))
        pen.text(corner, line, fill=INK if number < LINES - 1 else colour, font=font)
    return cell


def _caption(judged: Judged) -> list[str]:
    """Two lines of the prompt and one of the verdict, cut to the width of an image."""
    lines = textwrap.wrap(judged.prompt.text, WIDTH)[: LINES - 1]
    background = f", {judged.background}" if judged.background_right is False else ""
    verdict = f"{judged.guess} {judged.match:.2f}{background}"
    return [*lines, *[""] * (LINES - 1 - len(lines)), verdict[: WIDTH + 3]]
