"""The sheets of a grid: after a run, one for each prompt, its pictures beside labelled axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ldm import console, images
from ldm.files import atomic_write
from ldm.render.jobs.jobs import Job, short
from ldm.render.jobs.scan import Run
from ldm.render.prompts.snapshot import Prompts
from ldm.render.sheets.axes import Axis, draw_sheet, grid_entries

FOLDER = "grids"  # of the sheets, in the rendered folder


def write_sheets(run: Run, base: Prompts, axes: Sequence[Axis], names: Mapping[int, str]) -> list[Path]:
    """Write FOLDER/001.png, … over those of before and return their paths; `names`: `short` of a key -> file.

    base  the prompts before they became cells
    """
    folder, paths = run.target.folder, []
    sheets = console.progress(list(_cells(run, base, axes)), desc="grids", unit=" sheets")
    for number, (title, jobs) in enumerate(sheets, 1):
        sources = [names.get(short(job.key)) if isinstance(job, Job) else None for job in jobs]
        sheet = draw_sheet(axes, [None if name is None else folder / name for name in sources], title)
        paths.append(atomic_write(folder / FOLDER / f"{number:03d}.png", images.encode(sheet)))
    return paths


def _cells(run: Run, base: Prompts, axes: Sequence[Axis]) -> Iterator[tuple[str, list]]:
    """(the prompt, a job or a bad entry for each of its cells) of every prompt that is one."""
    items = iter(run.plan())
    for entry in base.read():
        cells = grid_entries(entry, axes, run.seed)
        found = [next(items) for _ in cells]
        if any(isinstance(item, Job) for item in found):
            yield entry.settings["prompt"], found
