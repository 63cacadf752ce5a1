"""The contact sheet: every judged picture in a green or red frame, with its prompt and what it was taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.evaluation.scores import Judged

SIDE, FRAME, TEXT, GAP, COLUMNS = 128, 4, 44, 6, 10  # px
RIGHT, WRONG, INK, PAPER = (40, 150, 60), (205, 40, 40), (30, 30, 30), (250, 250, 250)
FONT_SIZE, LINES, WIDTH = 10, 3, 27  # px, lines of text, letters a line


def contact_sheet(pictures: Sequence[Image | np.ndarray], judged: Sequence[Judged]) -> Image:
    """Rows of ten. Text below: the prompt, then the guess and the ground where they are wrong."""
    from PIL import Image, ImageDraw, ImageFont

    columns = min(COLUMNS, len(pictures))
    cell = (SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + GAP + TEXT)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, -(-len(pictures) // columns) * cell[1] + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for i, (picture, word) in enumerate(zip(pictures, judged)):
        x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        good = (word.first or not word.prompt.objects) and word.ground_right is not False
        pen.rectangle((x, y, x + SIDE + 2 * FRAME - 1, y + SIDE + 2 * FRAME - 1), fill=RIGHT if good else WRONG)
        tile = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        sheet.paste(tile.convert("RGB").resize((SIDE, SIDE)), (x + FRAME, y + FRAME))
        for number, line in enumerate(_caption(word)):
            place = (x, y + SIDE + 2 * FRAME + 1 + number * (FONT_SIZE + 3))
            pen.text(place, line, fill=INK if number < LINES - 1 else RIGHT if good else WRONG, font=font)
    return sheet


def _caption(judged: Judged) -> list[str]:
    """Two lines of the prompt and one of the verdict, cut to the width of a picture."""
    import textwrap

    said = textwrap.wrap(judged.prompt.text, WIDTH)[: LINES - 1]
    verdict = f"{judged.guess} {judged.match:.2f}" + (f", {judged.ground}" if judged.ground_right is False else "")
    return [*said, *[""] * (LINES - 1 - len(said)), verdict[: WIDTH + 3]]
