"""x/y/z grids: up to three settings and every combination of their values.

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from ldm.errors import ConfigError, LdmError
from ldm.pipeline.keywords import MAX_IMAGES
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.jobs import Job, canonical, short
from ldm.render.prompts.entry import Entry, Prompts
from ldm.render.prompts.line_settings import WORDS, find_word
from ldm.render.prompts.setting_table import LINE, NOT_CONTENT, SETTINGS, of_scope
from ldm.render.replay.overrides import Changes

MAX_AXES, MAX_CELLS = 3, 1000  # cells: images of one prompt
SHOWN = {"guidance_scale": "guidance", "num_inference_steps": "steps"}  # on sheets, as on the page
_NUMBER = r"(\d{1,19}(?:\.\d{1,9})?)"
_RANGE = re.compile(rf"\s*{_NUMBER}\s*-\s*{_NUMBER}\s*(?::\s*{_NUMBER})?\s*")
_REPLACE = re.compile(r'\s*("(?:[^"]|"")*"|[^",]*?)\s*->(.*)', re.DOTALL)


@dataclass(frozen=True)
class Axis:
    """One setting and the values it takes."""

    word: str  # as it was given
    labels: tuple[str, ...]  # of the values
    changes: tuple[Changes, ...]  # one for each; none where `search` is given
    search: str | None = None  # the text of the prompt that the values replace

    @property
    def names(self) -> frozenset[str]:
        """The settings that it changes."""
        return frozenset({"prompt"}) if self.search is not None else frozenset().union(*(c.names for c in self.changes))

    def label(self, i: int) -> str:
        """What stands beside the i-th value's images."""
        word = SHOWN.get(WORDS.get(find_word(self.word) or "", ""), self.word)
        return f"{word} {self.labels[i] or '(nothing)'}"


def check_grid(items: str | Sequence[str], shard: str | None, num_images: int | None) -> tuple[Axis, ...]:
    """The axes of a run. Raises ConfigError where it is sharded, or a line makes several images."""
    axes = read_axes([items] if isinstance(items, str) else items)
    if shard is not None:
        raise ConfigError("a grid needs all of its images", where="shard", hint="leave --shard or --grid out")
    if num_images not in (None, 1):
        raise ConfigError("a cell of a grid holds one image", where="num_images", hint="use an axis of seeds")
    return axes


def read_axes(items: Sequence[str]) -> tuple[Axis, ...]:
    """From WORD=VALUE,VALUE,… each. Raises ConfigError: more than three axes, more than 1,000 images, two axes for
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
        raise ConfigError(f"{lengths} are {cells:,} images a prompt, more than {MAX_CELLS:,}", where="--grid")
    return axes


def _axis(item: str) -> Axis:
    word, equals, rest = item.partition("=")
    word = word.strip()
    if not equals or not rest.strip():
        raise ConfigError(f"expected WORD=VALUE,VALUE,… and got {item!r:.80}", where="--grid")
    name = WORDS.get(find_word(word) or "")
    if name in of_scope(LINE):
        raise ConfigError(f"{word} changes no image", where="--grid", hint="choose another setting")
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
        raise ConfigError(f"{error.where}: {error.what}", where="--grid", hint=error.hint) from None


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
    match = _RANGE.fullmatch(part) if name is not None and SETTINGS[name].counts else None
    if not match:
        return [part]
    low, high = Decimal(match[1]), Decimal(match[2])
    whole = low == low.to_integral() and high == high.to_integral()
    if match[3] is None and not whole:
        raise ConfigError(f"{part} needs a step", where="--grid", hint=f"write for example {part}:0.5")
    step = Decimal(match[3] or 1)
    if low > high or not step:
        raise ConfigError(f"{part} is no range", where="--grid")
    count = int((high - low) / step) + 1
    if count > MAX_CELLS:
        raise ConfigError(f"{part} are {count:,} values, more than {MAX_CELLS:,}", where="--grid")
    return [format((low + i * step).normalize(), "f") for i in range(count)]


def gridded(prompts: Prompts, axes: Sequence[Axis], run_seed: int) -> Prompts:
    """An entry for each cell of the grid of each entry; the cells of one grid share a sheet."""

    def cells() -> Iterator[Entry]:
        for number, entry in enumerate(prompts.entries):
            for cell in grid_entries(entry, axes, run_seed):
                yield cell if cell.error else replace(cell, sheet=(number, entry.settings["prompt"]))

    return replace(prompts, entries=cells(), grids=True)


def with_sheets(items: Iterable[Job | Entry], job_file: JobFile) -> Iterator[Job | Entry]:
    """What became of the entries of `gridded`, one by one; each sheet with any job is written into `job_file`."""
    for sheet, cells in itertools.groupby(items, lambda item: item.sheet):
        keys: list[int | None] = []
        for item in cells:
            keys.append(short(item.key) if isinstance(item, Job) else None)
            yield item
        if sheet is not None and any(key is not None for key in keys):
            job_file.add_sheet(sheet[1], keys)


def grid_entries(entry: Entry, axes: Sequence[Axis], run_seed: int = 0) -> list[Entry]:
    """An entry for each cell, the first axis' values changing fastest; or the one entry with an error.

    All cells have one seed: the entry's, or one from the run's seed and the entry's content.
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
        hint = 'say one seed, and --grid "seed=1,2,3" for an axis of seeds'
        raise ConfigError("a cell of a grid holds one image", where="seed", hint=hint)
    if seeds is not None or any("seed" in axis.names for axis in axes):
        return dict(settings)
    content = canonical({name: value for name, value in settings.items() if name not in NOT_CONTENT})
    drawn = hashlib.sha256(b"%d:grid:" % run_seed + content).digest()
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
    labels = ", ".join(axis.label(i) for axis, i in zip(axes, pick))
    return replace(entry, where=f"{entry.where}, {labels}", settings=cell)
