"""Prompt files of any tool as a stream of entries: settings that were checked, or an error with its line.

Text (plain, A1111's and kohya's flags, JSON objects; each line by itself), .jsonl, .csv and .tsv are streamed: memory
does not grow with the file. .json (up to 32 MiB) and .toml (up to 8 MiB, kohya's [prompt] [[prompt.subset]] too) are
read whole. UTF-8; # starts a comment line.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import ConfigError, LdmError
from ldm.render.prompts.line_parser import DECODER, is_comment, pairs_of_json, pairs_of_line, pairs_of_value
from ldm.render.prompts.line_settings import WORDS, find_word, parse_settings
from ldm.settings_files import load

MAX_LINE = 4 << 20  # bytes; two texts of 100,000 characters fit, however they are escaped
MAX_JSON, MAX_TOML = 32 << 20, 8 << 20  # bytes of a file that is read whole
SHOWN = 200  # characters of a line that an entry keeps

Lines = Iterator[tuple[int, "str | ConfigError"]]


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
    dtype: str = "auto"  # that of images that are drawn again, where all have the same


def read_entries(
    prompts: str | os.PathLike | Iterable, name: str | None = None, base: Path | None = None
) -> Iterator[Entry]:
    """The entries of a prompt file ("-": standard input), or of a list of texts and groups of settings.

    `name` is what entries call the file, `base` where the paths in it begin (its folder). A bad line is an entry with
    an error. Raises ConfigError for what is wrong with the file as a whole: missing, no text, bad JSON or TOML, a CSV
    without a prompt column.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        yield from _elements(enumerate(prompts, 1), name or "prompts", Path())
        return
    if os.fspath(prompts) == "-":
        yield from _read(sys.stdin.buffer, name or "stdin", "", Path())
        return
    path = Path(prompts)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".parquet", ".xlsx"):
        raise ConfigError(f"{suffix} files are not read", where=path, hint="write .txt, .jsonl, .json, .csv or .toml")
    if suffix == ".toml":
        yield from _toml(path, name or str(path), base or path.parent)
        return
    with _opened(path) as handle:
        yield from _read(handle, name or str(path), suffix, base or path.parent)


def open_prompts(prompts: str | os.PathLike | Iterable) -> Prompts:
    """A prompt file, "-" or a list of prompts, read as far as its first entry.

    Raises ConfigError where there is no such file, or it is refused as a whole, or holds no prompt.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        name = "prompts"
    else:
        name = "stdin" if os.fspath(prompts) == "-" else str(Path(prompts))
    entries = read_entries(prompts)
    first = next(entries, None)
    if first is None:
        raise ConfigError("holds no prompts", where=name)
    return Prompts(name, itertools.chain([first], entries))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        handle = path.open("rb")
    except FileNotFoundError:
        raise ConfigError("no such prompt file", where=path) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read ({error})", where=path) from None
    with handle:
        yield handle


def _read(handle: BinaryIO, name: str, suffix: str, base: Path) -> Iterator[Entry]:
    if suffix == ".json":
        yield from _json(handle, name, base)
        return
    lines = _lines(handle, name)
    first = next(lines, None)
    while first and isinstance(first[1], str) and _is_blank(first[1]):
        first = next(lines, None)
    if first is None:
        return
    rest = itertools.chain([first], lines)
    if suffix in (".csv", ".tsv") or (suffix not in (".jsonl", ".ndjson") and _is_header(first[1])):
        yield from _csv(rest, name, base)
        return
    pairs_of = pairs_of_json if suffix in (".jsonl", ".ndjson") else pairs_of_line
    for number, line in rest:
        if isinstance(line, str) and _is_blank(line):
            continue
        yield _entry(f"{name}:{number}", number, line, pairs_of, base)


def _is_blank(line: str) -> bool:
    text = line.strip()
    return not text or text.startswith("#")


def _is_header(line: str | ConfigError) -> bool:
    """Whether a first line that is not in a .csv names columns all the same: `prompt,seed`."""
    if not isinstance(line, str):
        return False
    cells = [cell.strip(" \"'\r\n") for cell in re.split("[,;\t]", line)]
    names = {WORDS.get(find_word(cell) or "") for cell in cells if not is_comment(cell)}
    return len(cells) > 1 and "prompt" in names and None not in names


def _lines(handle: BinaryIO, name: str) -> Lines:
    """(number from 1, line without its end); an error in place of a line too long or not UTF-8. Bounded memory."""
    number = 0
    while line := handle.readline(MAX_LINE + 1):
        number += 1
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in line:
                kind = "is UTF-16" if line.startswith((b"\xff\xfe", b"\xfe\xff")) else "holds NUL bytes and is no text"
                raise ConfigError(kind, where=name, hint="save it as UTF-8 text")
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while (rest := handle.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, ConfigError(f"the line is longer than {MAX_LINE >> 20} MiB")
            continue
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            place = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            yield number, ConfigError(f"is not UTF-8 ({place})", hint="save the file as UTF-8")


def _entry(
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


def _elements(items: Iterable[tuple[int, Any]], name: str, base: Path) -> Iterator[Entry]:
    for number, item in items:
        yield _entry(f"{name}, entry {number}", number, item, pairs_of_value, base)


# CSV


class _Records:
    """Feeds csv.reader with lines, and after a bad record once more with all its lines but the first."""

    def __init__(self, lines: Lines):
        self._lines, self._again, self.taken = lines, deque(), []

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> str:
        while True:
            number, line = self._again.popleft() if self._again else next(self._lines)
            if self.taken or isinstance(line, ConfigError) or not _is_blank(line):
                break
        self.taken.append((number, line))
        if isinstance(line, ConfigError):
            raise line
        return line + "\n"

    def records(self, delimiter: str) -> Iterator[tuple[int, list[str] | ConfigError]]:
        """(number of its first line, cells or what is wrong)."""
        reader = csv.reader(self, delimiter=delimiter, strict=True)
        while True:
            self.taken = []
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, ConfigError) as error:
                number, line = self.taken[0]
                self._again.extendleft(reversed(self.taken[1:]))
                yield number, line if isinstance(line, ConfigError) else ConfigError(f"bad CSV ({error})")
            else:
                yield self.taken[0][0], row


def _csv(lines: Lines, name: str, base: Path) -> Iterator[Entry]:
    first = next(lines)
    if isinstance(first[1], ConfigError):
        raise ConfigError(first[1].what, where=f"{name}:{first[0]}", hint=first[1].hint)
    delimiter = max(",;\t", key=first[1].count)
    records = _Records(itertools.chain([first], lines)).records(delimiter)
    number, header = next(records)
    _check_header(header, f"{name}:{number}")

    def pairs_of(row: list[str]) -> list[tuple[str, Any]]:
        if len(row) > len(header):
            raise ConfigError(f"{len(row)} cells in {len(header)} columns", hint="put texts that hold commas in quotes")
        return [(word, cell) for word, cell in zip(header, row) if cell.strip() and not is_comment(word)]

    for number, row in records:
        yield _entry(f"{name}:{number}", number, row, pairs_of, base)


def _check_header(header: list[str] | ConfigError, where: str) -> None:
    """Raise ConfigError for a column that is unknown or there twice, or a table without prompts."""
    if isinstance(header, ConfigError):
        raise ConfigError(header.what, where=where, hint=header.hint)
    names = []
    for column in header:
        if column.strip() and not is_comment(column):
            word = find_word(column)
            if word is None:
                try:
                    parse_settings([(column, "")], Path())
                except ConfigError as error:
                    raise ConfigError(f"unknown column {column!r:.80}", where=where, hint=error.hint) from None
            names.append(WORDS.get(word, word))
    if "prompt" not in names:
        raise ConfigError("no column is named prompt", where=where, hint="name the columns in the first line")


# Read whole


def _json(handle: BinaryIO, name: str, base: Path) -> Iterator[Entry]:
    """A list of groups or texts, element by element; or a group with a list of them under `prompts`."""
    data = handle.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ConfigError(f"is larger than {MAX_JSON >> 20} MiB", where=name, hint="write .jsonl, which is streamed")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8", where=name, hint="save it as UTF-8 text") from None
    del data
    if not text.lstrip(" \t\r\n").startswith("["):
        value, end, line = _json_value(text, 0, 1, name)
        if not isinstance(value, dict) or text[end:].strip():
            raise ConfigError("expected one list or group of settings", where=f"{name}:{line}")
        yield from _grouped(value, name, base, ())
        return
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    position, line = _skip(text, position, line)
    while text[position : position + 1] != "]":
        at = line
        value, position, line = _json_value(text, position, line, name)
        yield _entry(f"{name}:{at}", at, value, pairs_of_value, base)
        position, line = _skip(text, position, line)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            raise ConfigError("bad JSON (expected a comma or the end of the list)", where=f"{name}:{line}")
        if mark == ",":
            position, line = _skip(text, position + 1, line)
    if text[position + 1 :].strip():
        raise ConfigError("bad JSON (something follows the list)", where=f"{name}:{line}")


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int, line: int) -> tuple[int, int]:
    end = _SPACE.match(text, position).end()
    return end, line + text.count("\n", position, end)


def _json_value(text: str, position: int, line: int, name: str) -> tuple[Any, int, int]:
    """(value, where it ends, the line of that). Raises ConfigError: what follows bad JSON cannot be read."""
    position, line = _skip(text, position, line)
    try:
        value, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise ConfigError(f"bad JSON ({error.msg})", where=f"{name}:{error.lineno}:{error.colno}") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"bad JSON ({error})", where=f"{name}:{line}") from None
    except RecursionError:
        raise ConfigError("bad JSON (nested too deeply)", where=f"{name}:{line}") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{name}:{line}") from None
    return value, end, line + text.count("\n", position, end)


def _toml(path: Path, name: str, base: Path) -> Iterator[Entry]:
    with _opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
    if size > MAX_TOML:
        raise ConfigError(f"is larger than {MAX_TOML >> 20} MiB", where=path, hint="write .jsonl, which is streamed")
    value = load(path)
    text = path.read_text(encoding="utf-8-sig")
    heads = re.finditer(r"^[ \t]*\[\[[ \t]*(prompts?|prompt[ \t]*\.[ \t]*subset)[ \t]*\]\]", text, re.MULTILINE)
    yield from _grouped(value, name, base, [1 + text.count("\n", 0, head.start()) for head in heads])


def _grouped(data: Mapping[str, Any], name: str, base: Path, lines: Iterable[int]) -> Iterator[Entry]:
    """The prompts of a file that is one group of settings, which hold for all of them.

    prompts = […] or [[prompts]]; kohya's [prompt] with [[prompt.subset]]; or a single prompt. `lines` are those where
    the elements begin, as far as they are known.
    """
    common = dict(data)
    items: Any = [{}]
    key = "prompts" if "prompts" in common else "prompt"
    if isinstance(common.get(key), list):
        items = common.pop(key)
    elif isinstance(common.get(key), dict):
        common |= common.pop(key)
        items = common.pop("subset", [{}])
    if not isinstance(items, list):
        raise ConfigError("expected a list of prompts", where=f"{name} (subset)")
    try:
        shared = parse_settings(pairs_of_value(common), base)
    except LdmError as error:
        raise ConfigError(error.what, where=f"{name} ({error.where})", hint=error.hint) from None
    places = list(lines)
    for i, item in enumerate(items):
        numbered = len(places) == len(items)
        where = f"{name}:{places[i]}" if numbered else f"{name}, entry {i + 1}"
        yield _entry(where, places[i] if numbered else i + 1, item, pairs_of_value, base, shared)
