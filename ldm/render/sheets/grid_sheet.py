"""The sheets of a grid: after a run, one for each prompt, its images beside labelled axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ldm import console
from ldm.files import atomic_write
from ldm.images import encode
from ldm.render.sheets import labels
from ldm.render.sheets.axes import MAX_AXES, Axis
from ldm.render.sheets.labels import Source

FOLDER = "grids"  # of the sheets, in the rendered folder
MAX_SIDE, MAX_AREA = 16_000, 64_000_000  # pixels of a sheet; larger images are made smaller
GAP, LABEL_LINES, TITLE_LINES = 4, 3, 3
LEAST, MOST_FONT = 10, 28  # pixels


def write_sheets(
    folder: Path, sheets: Iterable[tuple[str, Sequence[int | None]]], axes: Sequence[Axis], names: Mapping[int, str]
) -> list[Path]:
    """Write FOLDER/001.png, … over those of before and return their paths.

    sheets  (title, `short` of the key of the job in each cell) of each
    names   `short` of a key -> file in `folder`
    """
    paths = []
    for number, (title, keys) in enumerate(console.progress(list(sheets), desc="grids", unit=" sheets"), 1):
        files = [names.get(key) for key in keys]
        sheet = draw_sheet(axes, [None if name is None else folder / name for name in files], title)
        paths.append(atomic_write(folder / FOLDER / f"{number:03d}.png", encode(sheet)))
    return paths


def draw_sheet(axes: Sequence[Axis], images: Sequence[Source], title: str = "") -> Image.Image:
    """The images of `grid_entries`, in its order, as one sheet with labels; None is a grey cell."""
    axes = (*axes, *[Axis("", ("",), (), "")] * (MAX_AXES - len(axes)))
    columns, rows, blocks = (len(axis.labels) for axis in axes)
    across = max(1, min(blocks, round(math.sqrt(blocks * rows / columns)))) if blocks > 1 else 1  # blocks side by side
    width, height = _cell_size(images, columns * across, rows * math.ceil(blocks / across))
    font = ImageFont.load_default(max(LEAST, min(MOST_FONT, width // 10)))
    layout = _Layout(axes, width, height, across, font, title)
    sheet = Image.new("RGB", layout.size, layout.paper)
    pen = ImageDraw.Draw(sheet)
    layout.write(pen)
    for number, source in enumerate(images):
        x, y = layout.place(number)
        _draw_cell(sheet, pen, (x, y, width, height), source, font)
    return sheet


def _cell_size(images: Sequence[Source], columns: int, rows: int) -> tuple[int, int]:
    """(width, height) of a cell: the largest image's, or less where the sheet would be too large."""
    sizes = [(64, 64)]
    for source in images:
        try:
            if source is not None:
                with source.copy() if hasattr(source, "copy") else Image.open(source) as image:
                    sizes.append(image.size)
        except (OSError, ValueError, SyntaxError):
            continue
    width, height = (max(sides) for sides in zip(*sizes))
    area = width * height * columns * rows
    scale = min(1.0, math.sqrt(MAX_AREA / area), MAX_SIDE / (width * columns), MAX_SIDE / (height * rows))
    return max(8, int(width * scale)), max(8, int(height * scale))


def _draw_cell(sheet: Any, pen: Any, box: tuple[int, int, int, int], source: Source, font: Any) -> None:
    x, y, width, height = box
    tile = labels.tile(source, width, height)
    if tile is not None:
        sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
        return
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=labels.EMPTY)
    labels.write_lines(pen, (x + GAP, y + GAP), [labels.cut("no image", font, width - 2 * GAP)], font)


class _Layout:
    """Where everything is: the title, then blocks, each with columns' labels above and rows' labels on the left."""

    def __init__(self, axes: Sequence[Axis], width: int, height: int, across: int, font: Any, title: str):
        self.axes, self.font, self.paper = axes, font, labels.PAPER
        self._columns, self._rows, self._blocks = (len(axis.labels) for axis in axes)
        self._step, self._across = (width + GAP, height + GAP), across
        line = labels.line_height(font)
        texts = [[axis.label(i) if axis.word else "" for i in range(len(axis.labels))] for axis in axes]
        left = min(max(font.getlength(text) for text in texts[1]), max(width, 12 * font.size))
        self._left = math.ceil(left) + 2 * GAP if texts[1][0] else 0
        block_width = self._left + self._columns * self._step[0]
        self._heads = [labels.wrapped(text, font, width, LABEL_LINES) for text in texts[0]]
        self._sides = [labels.wrapped(text, font, self._left - GAP, max(1, height // line)) for text in texts[1]]
        self._names = [labels.wrapped(text, font, block_width, LABEL_LINES) for text in texts[2]]
        self._named = max(len(lines) for lines in self._names) * line
        self._headed = max(len(lines) for lines in self._heads) * line + GAP
        block_height = self._named + self._headed + self._rows * self._step[1] + 2 * GAP
        self._block = block_width + 4 * GAP, block_height
        total = self._block[0] * across
        self._title = labels.wrapped(title, font, total - GAP, TITLE_LINES)
        self._top = GAP + len(self._title) * line + (GAP if self._title else 0)
        self.size = total, self._top + block_height * math.ceil(self._blocks / across)

    def _corner(self, block: int) -> tuple[int, int]:
        return GAP + block % self._across * self._block[0], self._top + block // self._across * self._block[1]

    def place(self, number: int) -> tuple[int, int]:
        """The left upper corner of image `number`."""
        block, rest = divmod(number, self._rows * self._columns)
        row, column = divmod(rest, self._columns)
        x, y = self._corner(block)
        return x + self._left + column * self._step[0], y + self._named + self._headed + row * self._step[1]

    def write(self, pen: Any) -> None:
        """All texts."""
        labels.write_lines(pen, (GAP, GAP), self._title, self.font)
        for block in range(self._blocks):
            x, y = self._corner(block)
            labels.write_lines(pen, (x, y), self._names[block], self.font)
            for column, lines in enumerate(self._heads):
                labels.write_lines(pen, (x + self._left + column * self._step[0], y + self._named), lines, self.font)
            for row, lines in enumerate(self._sides):
                labels.write_lines(pen, (x, y + self._named + self._headed + row * self._step[1]), lines, self.font)
