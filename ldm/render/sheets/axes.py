"""x/y/z grids: up to three settings, every combination of their values, and a sheet with labelled axes.

    --grid "steps=4,8,16" --grid "sampler=euler,DPM++ 2M Karras" --grid "cfg=2-8:1.5"

The first axis runs to the right, the second down, the third makes a block for each value. Words are those of prompt
lines. A value that holds a comma stands in double quotes. a-b:step counts from a to b; the step may be left out between
whole numbers. prompt=cat->dog,bird replaces "cat" in the prompt, and keeps it in the first column; prompt="a cat","a
dog" takes whole prompts.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError, LdmError
from ldm.pipeline.keywords import MAX_IMAGES
from ldm.render.jobs.jobs import NOT_OF_THE_PICTURE, canonical
from ldm.render.prompts.files import Entry
from ldm.render.prompts.line_settings import WORDS, known_word
from ldm.render.replay.overrides import Changes

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.render.sheets.labels import Source

MAX_AXES, MAX_CELLS = 3, 1000  # cells: pictures of one prompt
NUMBERS = ("seed", "num_inference_steps", "guidance_scale", "guidance_rescale", "eta", "strength", "clip_skip")
NUMBERS += ("height", "width")
NO_AXES = ("name", "num_images", "batch_size")  # words that say nothing about a picture
_NUMBER = r"(\d{1,19}(?:\.\d{1,9})?)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}\s*(?::\s*{_NUMBER})?\s*")
_REPLACE = re.compile(r'\s*("(?:[^"]|"")*"|[^",]*?)\s*->(.*)', re.DOTALL)


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes."""

    word: str  # as it was given
    labels: tuple[str, ...]  # of the values
    changes: tuple[Changes, ...]  # one for each; none where `search` is given
    search: str | None = None  # what the values stand for in the prompt

    @property
    def names(self) -> frozenset[str]:
        """The settings that it changes."""
        return frozenset({"prompt"}) if self.search is not None else frozenset().union(*(c.names for c in self.changes))


def read_axes(items: Sequence[str]) -> tuple[Axis, ...]:
    """From WORD=VALUE,VALUE,… each. Raises ConfigError: more than three axes, more than 1,000 pictures, two axes for
    one setting, a value twice or one that the word does not take.
    """
    if len(items) > MAX_AXES:
        raise ConfigError(f"{len(items)} axes are more than {MAX_AXES}", where="--grid")
    axes = tuple(_axis(item) for item in items)
    for a, b in itertools.combinations(axes, 2):
        if a.names & b.names and (a.search is None or b.search is None):
            raise ConfigError(f"{a.word} and {b.word} change the same setting", where="--grid")
    cells = math.prod(len(axis.labels) for axis in axes)
    if cells > MAX_CELLS:
        lengths = " x ".join(str(len(axis.labels)) for axis in axes)
        raise ConfigError(f"{lengths} are {cells:,} pictures a prompt, more than {MAX_CELLS:,}", where="--grid")
    return axes


def _axis(item: str) -> Axis:
    word, equals, rest = item.partition("=")
    word = word.strip()
    known = known_word(word)
    if not equals or not rest.strip():
        raise ConfigError(f"expected WORD=VALUE,VALUE,… and got {item!r:.80}", where="--grid")
    name = WORDS.get(known or "")
    if name in NO_AXES:
        raise ConfigError(f"{word} says nothing about a picture", where="--grid", todo="choose another setting")
    replace = _REPLACE.fullmatch(rest) if name == "prompt" else None
    if replace:
        (search,) = _split(replace[1])
        if not search:
            raise ConfigError("there is nothing to search for before ->", where="--grid")
        return _distinct(Axis(word, (search, *_split(replace[2])), (), search))
    values = [value for part in _split(rest) for value in _values(part, name)]
    try:
        return _distinct(Axis(word, tuple(values), tuple(Changes.read([f"{word}={value}"]) for value in values)))
    except ConfigError as error:
        raise ConfigError(f"{error.where}: {error.what}", where="--grid", todo=error.todo) from None


def _distinct(axis: Axis) -> Axis:
    twice = next((label for label in axis.labels if axis.labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"{axis.word}: {twice!r:.80} is there twice", where="--grid")
    return axis


def _split(text: str) -> list[str]:
    """Values between commas, those in double quotes with commas of their own."""
    try:
        rows = list(csv.reader([text], skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ConfigError(f"{text!r:.80} cannot be split at its commas ({error})", where="--grid") from None
    return [value.strip() for value in rows[0]] if rows and rows[0] else [""]


def _values(part: str, name: str | None) -> list[str]:
    """4, or what 4-16:4 counts."""
    match = _RANGE.fullmatch(part) if name in NUMBERS else None
    if not match:
        return [part]
    low, high = Decimal(match[1]), Decimal(match[2])
    whole = low == low.to_integral() and high == high.to_integral()
    if match[3] is None and not whole:
        raise ConfigError(f"{part} needs a step", where="--grid", todo=f"write for example {part}:0.5")
    step = Decimal(match[3] or 1)
    if low > high or not step:
        raise ConfigError(f"{part} is no range", where="--grid")
    count = int((high - low) / step) + 1
    if count > MAX_CELLS:
        raise ConfigError(f"{part} are {count:,} values, more than {MAX_CELLS:,}", where="--grid")
    return [format((low + i * step).normalize(), "f") for i in range(count)]


def grid_entries(entry: Entry, axes: Sequence[Axis], run_seed: int = 0) -> list[Entry]:
    """An entry for each cell, the first axis' values changing fastest; or the one entry with an error.

    All cells have one seed: the entry's, or one from the run's seed and what the entry says.
    """
    if entry.error is not None:
        return [entry]
    try:
        settings = _with_seed(entry.settings, axes, run_seed)
        for axis in axes:
            if axis.search is not None and axis.search not in settings["prompt"]:
                raise ConfigError(f"{axis.search!r:.80} is not in the prompt", where="--grid")
        picks = itertools.product(*(range(len(axis.labels)) for axis in reversed(axes)))
        return [_cell(entry, settings, axes, pick[::-1]) for pick in picks]
    except LdmError as error:
        return [entry.refused(error)]


def _with_seed(settings: Mapping[str, Any], axes: Sequence[Axis], run_seed: int) -> dict[str, Any]:
    seeds, images = settings.get("seed"), settings.get("num_images", 1)
    if isinstance(seeds, tuple) or images != 1:
        todo = 'say one seed, and --grid "seed=1,2,3" for an axis of seeds'
        raise ConfigError("a cell of a grid holds one picture", where="seed", todo=todo)
    if seeds is not None or any("seed" in axis.names for axis in axes):
        return dict(settings)
    own = canonical({name: value for name, value in settings.items() if name not in NOT_OF_THE_PICTURE})
    drawn = hashlib.sha256(b"%d:grid:" % run_seed + own).digest()
    return {**settings, "seed": int.from_bytes(drawn[:8], "big") % (2**32 - MAX_IMAGES)}


def _cell(entry: Entry, settings: Mapping[str, Any], axes: Sequence[Axis], pick: Sequence[int]) -> Entry:
    cell = dict(settings)
    for axis, i in zip(axes, pick):
        if axis.search is None:
            kept = {name: value for name, value in cell.items() if name not in axis.changes[i].names}
            cell = {**kept, **axis.changes[i].settings}
    for axis, i in zip(axes, pick):
        if axis.search is not None:
            cell["prompt"] = cell["prompt"].replace(axis.search, axis.labels[i])
    labels = ", ".join(_label(axis, i) for axis, i in zip(axes, pick))
    return Entry(f"{entry.where}, {labels}", entry.line, entry.text, cell)


def _label(axis: Axis, i: int) -> str:
    return f"{axis.word} {axis.labels[i] or '(nothing)'}"


# The sheet

MAX_SIDE, MAX_AREA = 16_000, 64_000_000  # pixels of a sheet; larger pictures are made smaller
GAP, LABEL_LINES, TITLE_LINES = 4, 3, 3
LEAST, MOST_FONT = 10, 28  # pixels


def draw_sheet(axes: Sequence[Axis], pictures: Sequence[Source], title: str = "") -> Image:
    """The pictures of `grid_entries`, in its order, as one sheet with labels; None is a grey cell."""
    from PIL import Image, ImageDraw, ImageFont

    axes = (*axes, *[Axis("", ("",), (), "")] * (MAX_AXES - len(axes)))
    columns, rows, blocks = (len(axis.labels) for axis in axes)
    across = max(1, min(blocks, round(math.sqrt(blocks * rows / columns)))) if blocks > 1 else 1  # blocks side by side
    width, height = _cell_size(pictures, columns * across, rows * math.ceil(blocks / across))
    font = ImageFont.load_default(max(LEAST, min(MOST_FONT, width // 10)))
    layout = _Layout(axes, width, height, across, font, title)
    sheet = Image.new("RGB", layout.size, layout.paper)
    pen = ImageDraw.Draw(sheet)
    layout.write(pen)
    for number, source in enumerate(pictures):
        x, y = layout.place(number)
        _draw_cell(sheet, pen, (x, y, width, height), source, font)
    return sheet


def _cell_size(pictures: Sequence[Source], columns: int, rows: int) -> tuple[int, int]:
    """(width, height) of a cell: the largest picture's, or less where the sheet would be too large."""
    from PIL import Image

    sizes = [(64, 64)]
    for source in pictures:
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
    from ldm.render.sheets import labels

    x, y, width, height = box
    tile = labels.tile(source, width, height)
    if tile is not None:
        sheet.paste(tile, (x + (width - tile.width) // 2, y + (height - tile.height) // 2))
        return
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=labels.EMPTY)
    labels.write_lines(pen, (x + GAP, y + GAP), [labels.cut("no picture", font, width - 2 * GAP)], font)


class _Layout:
    """Where everything is: the title, then blocks, each with columns' labels above and rows' labels on the left."""

    def __init__(self, axes: Sequence[Axis], width: int, height: int, across: int, font: Any, title: str):
        from ldm.render.sheets import labels

        self.axes, self.font, self.paper = axes, font, labels.PAPER
        self._columns, self._rows, self._blocks = (len(axis.labels) for axis in axes)
        self._step, self._across = (width + GAP, height + GAP), across
        line = labels.line_height(font)
        texts = [[_label(axis, i) if axis.word else "" for i in range(len(axis.labels))] for axis in axes]
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
        """The left upper corner of picture `number`."""
        block, rest = divmod(number, self._rows * self._columns)
        row, column = divmod(rest, self._columns)
        x, y = self._corner(block)
        return x + self._left + column * self._step[0], y + self._named + self._headed + row * self._step[1]

    def write(self, pen: Any) -> None:
        """All texts."""
        from ldm.render.sheets.labels import write_lines

        write_lines(pen, (GAP, GAP), self._title, self.font)
        for block in range(self._blocks):
            x, y = self._corner(block)
            write_lines(pen, (x, y), self._names[block], self.font)
            for column, lines in enumerate(self._heads):
                write_lines(pen, (x + self._left + column * self._step[0], y + self._named), lines, self.font)
            for row, lines in enumerate(self._sides):
                write_lines(pen, (x, y + self._named + self._headed + row * self._step[1]), lines, self.font)
