"""The contact sheet: every judged image in a green or red frame, with its prompt and the judge's guess."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ldm.evaluation.judged import Judged

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE, FRAME, TEXT, GAP, COLUMNS = 128, 4, 44, 6, 10  # px
RIGHT, WRONG, INK, PAPER = (40, 150, 60), (205, 40, 40), (30, 30, 30), (250, 250, 250)
FONT_SIZE, LINES, WIDTH = 10, 3, 27  # px, lines of text, letters a line


def contact_sheet(images: Sequence[Image | np.ndarray], judged: Sequence[Judged]) -> Image:
    """Rows of ten images. Below each: its prompt, the guess, and the background where it is wrong."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, len(images))
    cell = (SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + GAP + TEXT)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, -(-len(images) // columns) * cell[1] + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, (image, verdict) in enumerate(zip(images, judged)):
        x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        good = (verdict.first or not verdict.prompt.objects) and verdict.background_right is not False
        pen.rectangle((x, y, x + SIDE + 2 * FRAME - 1, y + SIDE + 2 * FRAME - 1), fill=RIGHT if good else WRONG)
        tile = Image.fromarray(image) if isinstance(image, np.ndarray) else image
        sheet.paste(tile.convert("RGB").resize((SIDE, SIDE)), (x + FRAME, y + FRAME))
        for number, line in enumerate(_caption(verdict)):
            corner = (x, y + SIDE + 2 * FRAME + 1 + number * (FONT_SIZE + 3))
            pen.text(corner, line, fill=INK if number < LINES - 1 else RIGHT if good else WRONG, font=font)
    return sheet


def _caption(judged: Judged) -> list[str]:
    """Two lines of the prompt and one of the verdict, cut to the width of an image."""
    import textwrap

    lines = textwrap.wrap(judged.prompt.text, WIDTH)[: LINES - 1]
    verdict = f"{judged.guess} {judged.match:.2f}" + (
        f", {judged.background}" if judged.background_right is False else ""
    )
    return [*lines, *[""] * (LINES - 1 - len(lines)), verdict[: WIDTH + 3]]
