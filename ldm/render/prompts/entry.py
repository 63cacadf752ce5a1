"""An entry of a prompt file: one line's settings, checked, or what is wrong with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import ConfigError, LdmError
from ldm.render.prompts.line_settings import parse_settings

SHOWN = 200  # characters of a line that an entry keeps

Lines = Iterator[tuple[int, "str | ConfigError"]]  # (number from 1, the line or what is wrong with it)


@dataclass(frozen=True, slots=True)
class Entry:
    """One prompt line: its settings under our names, or what is wrong with it."""

    where: str  # prompts.txt:12
    line: int  # from 1; the number of the entry where the format has no lines
    text: str  # its beginning
    settings: Mapping[str, Any] | None
    error: LdmError | None = None  # says where, field and what to do
    field: str | None = None  # the word that the error is about
    source: Mapping[str, Any] | None = None  # of an image to draw again: what its file says of model and machine
    sheet: tuple[int, str] | None = None  # of a cell of a grid: number and title of its sheet

    def refused(self, error: LdmError) -> Entry:
        """This entry with an error in place of its settings."""
        field = None if error.where is None else str(error.where)
        where = self.where if field is None else f"{self.where} ({field})"
        named = ConfigError(error.what, where=where, hint=error.hint)
        return replace(self, settings=None, error=named, field=field)


@dataclass(frozen=True)
class Prompts:
    """Where the entries of a run come from."""

    name: str  # for messages
    entries: Iterable[Entry]  # read once
    of_run: Mapping[str, Any] = field(default_factory=dict)  # render's settings of images that are drawn again
    grids: bool = False  # whether they are cells of grids


def make_entry(
    where: str,
    number: int,
    value: Any,
    pairs_of: Callable[[Any], list[tuple[str, Any]]],
    base: Path,
    common: Mapping[str, Any] | None = None,
) -> Entry:
    """The entry of one line or element, whose own settings win over `common`."""
    shown = value if isinstance(value, str) else "" if isinstance(value, ConfigError) else f"{value!r:.{SHOWN}}"
    entry = Entry(where, number, shown[:SHOWN], None)
    try:
        if isinstance(value, ConfigError):
            raise value
        settings = {**(common or {}), **parse_settings(pairs_of(value), base)}
        if "prompt" not in settings:
            raise ConfigError("there is no prompt", where="prompt")
    except LdmError as error:
        return entry.refused(error)
    return Entry(where, number, entry.text, settings)


def is_blank(line: str) -> bool:
    text = line.strip()
    return not text or text.startswith("#")


def is_comment(word: str) -> bool:
    """Whether a column or key is a remark: its name begins with # or _."""
    return word.lstrip().startswith(("#", "_"))


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise ConfigError("no such prompt file", where=path) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    with handle:
        yield handle
