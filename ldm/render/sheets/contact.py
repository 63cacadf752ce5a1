"""Contact sheets: pages with all images of a rendered folder, each above its number and the beginning of its prompt."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm.config import require
from ldm.console import progress
from ldm.files import atomic_write
from ldm.images import encode
from ldm.render.output.folder import finished
from ldm.render.sheets import labels

FOLDER = "contact"  # of the pages, in the rendered folder
COLUMNS, ROWS = 6, 8
SIDE, LEAST, GAP, FONT_SIZE, LINES = 192, 96, 8, 12, 3  # pixels of the places for images, …; lines of text
_PAGE = re.compile(r"page-\d{3,}\.jpg")


def write_contact_sheets(folder: str | os.PathLike, columns: int = COLUMNS, rows: int = ROWS) -> list[Path]:
    """Write the pages as FOLDER/contact/page-001.jpg, …, over those of before, and return their paths.

    Raises ConfigError where the folder was not rendered, ResourceError where the pages cannot be written.
    """
    require(1 <= columns <= 50, f"{columns} is outside 1 to 50", "columns")
    require(1 <= rows <= 50, f"{rows} is outside 1 to 50", "rows")
    lines = finished(folder)
    target, paths = Path(folder) / FOLDER, []
    with progress(total=len(lines), desc="contact sheets", unit="image") as bar:
        for number, page in enumerate(contact_sheets(lines, Path(folder), columns, rows), 1):
            paths.append(atomic_write(target / f"page-{number:03d}.jpg", encode(page, "jpg")))
            bar.update(min(columns * rows, len(lines) - bar.n))
    for old in target.glob("page-*.jpg") if target.is_dir() else ():
        if old not in paths and _PAGE.fullmatch(old.name):
            old.unlink()
    return paths


def contact_sheets(lines: list[dict[str, Any]], folder: Path, columns: int, rows: int) -> Iterator[Image.Image]:
    """Pages of columns x rows images from the manifests' lines; one that cannot be read is a grey square."""
    sides = [line["settings"].get(name) for line in lines for name in ("width", "height")]
    side = max(LEAST, min(SIDE, max((side for side in sides if isinstance(side, int)), default=SIDE)))
    for start in range(0, len(lines), columns * rows):
        yield _page(lines[start : start + columns * rows], folder, columns, side)


def _page(lines: list[dict[str, Any]], folder: Path, columns: int, side: int) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    height = side + GAP + LINES * labels.line_height(font)
    sheet_rows = -(-len(lines) // columns)
    sheet = Image.new("RGB", (columns * (side + GAP) + GAP, sheet_rows * (height + GAP) + GAP), labels.PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, line in enumerate(lines):
        x, y = GAP + number % columns * (side + GAP), GAP + number // columns * (height + GAP)
        tile = labels.tile(folder / line["path"], side, side)
        if tile is None:
            pen.rectangle((x, y, x + side - 1, y + side - 1), fill=labels.EMPTY)
        else:
            sheet.paste(tile, (x + (side - tile.width) // 2, y + side - tile.height))
        text = f"{line.get('index')}  {line['settings'].get('prompt', '')}"
        labels.write_lines(pen, (x, y + side + GAP // 2), labels.wrapped(text, font, side, LINES), font)
    return sheet
