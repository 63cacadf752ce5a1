"""Prompts that can be read twice: as they were when the run began, whatever happens to their file meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldm import console
from ldm.device import DTYPES
from ldm.errors import ConfigError
from ldm.files import disk_errors
from ldm.render.prompts.files import Entry, read_entries, stdin_file
from ldm.render.replay.replay import read_replays
from ldm.render.sheets.axes import Axis, grid_entries

Read = Callable[[], Iterator[Entry]]
SHOWN = 5  # notes on what is not repeated


@dataclass(frozen=True)
class Prompts:
    """Where the entries of a run come from."""

    name: str  # for people
    read: Read
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of replays: where -> what their source says

    @property
    def dtype(self) -> str:
        """That of the pictures that are drawn again, if all tell the same."""
        found = {told.get("dtype") for told in self.told.values()}
        return found.pop() if len(found) == 1 and found <= set(DTYPES) else "auto"


def replayed(sources: str | os.PathLike | Sequence, changes: Sequence[str]) -> Prompts:
    """The entries of pictures, manifests and folders to be drawn again. Raises ConfigError as `read_replays` does."""
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    replays = list(read_replays(sources, changes))  # now: the manifest may be that of the folder that is written to
    notes = [f"{replay.entry.where}: {note}" for replay in replays for note in replay.notes]
    for note in notes[:SHOWN]:
        console.warn(note)
    if len(notes) > SHOWN:
        console.warn(f"{len(notes) - SHOWN} more things are not repeated")
    entries = [replay.entry for replay in replays]
    told = {replay.entry.where: _comparable(replay.told) for replay in replays}
    return Prompts(", ".join(map(str, sources[:3])), lambda: iter(entries), told)


def _comparable(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a source says, less a model that is told by its path alone (in manifests): the same one is used again."""
    return {name: value for name, value in told.items() if name != "model" or told.get("model_hash")}


def gridded(prompts: Prompts, axes: Sequence[Axis], run_seed: int) -> Prompts:
    """An entry for each cell of the grid of each entry."""

    def read() -> Iterator[Entry]:
        return (cell for entry in prompts.read() for cell in grid_entries(entry, axes, run_seed))

    told = {}
    for entry in prompts.read() if prompts.told else ():
        told |= {cell.where: prompts.told[entry.where] for cell in grid_entries(entry, axes, run_seed)}
    return replace(prompts, read=read, told=told)


@contextlib.contextmanager
def held(prompts: str | os.PathLike | Iterable) -> Iterator[Prompts]:
    """A prompt file, "-" or a list of prompts.

    Files and standard input ("-") are copied to the temporary folder. Raises ConfigError where there is no such file.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        items = list(prompts)
        yield Prompts("prompts", lambda: read_entries(items))
        return
    if os.fspath(prompts) == "-":
        with stdin_file() as copy:
            yield Prompts("stdin", lambda: read_entries(copy, "stdin", Path()))
        return
    path = Path(prompts)
    with tempfile.TemporaryDirectory(prefix="ldm-render-") as folder:
        copy = Path(folder) / f"prompts{path.suffix}"
        try:
            with path.open("rb") as source, disk_errors(copy), copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except FileNotFoundError:
            raise ConfigError("no such prompt file", where=path) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot be read ({error})", where=path) from None
        yield Prompts(str(path), lambda: read_entries(copy, str(path), path.parent))
