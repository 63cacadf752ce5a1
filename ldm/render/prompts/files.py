"""Prompt files of any tool as a stream of entries: settings that were checked, or an error with its line.

Text (plain, A1111's and kohya's flags, JSON objects; each line by itself), .jsonl, .csv and .tsv are streamed: memory
does not grow with the file. .json (up to 32 MB) and .toml (up to 8 MB, kohya's [prompt] [[prompt.subset]] too) are
read whole. UTF-8; # starts a comment line.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import ConfigError
from ldm.files import format_bytes
from ldm.render.prompts.csv_table import EXCEL, read_csv
from ldm.render.prompts.entry import Entry, Lines, Prompts, is_blank, is_comment, make_entry, open_file
from ldm.render.prompts.json_toml import pairs_of_json, pairs_of_value, read_json, read_toml
from ldm.render.prompts.line_parser import pairs_of_text
from ldm.render.prompts.line_settings import WORDS, find_word
from ldm.render.replay.a1111_text import FIRST_FIELD, MAX_TEXT, read_infotexts

FOREIGN = {  # how files begin that are no list of prompts -> (what they are, what to do)
    **dict.fromkeys(("<!doctype", "<html", "<?xml", "<svg"), ("HTML or XML", "save the prompts as plain text")),
    "{\\rtf": ("RTF", "save it as plain text"),
    "version https://git-lfs": ("a pointer of git-lfs", "run git lfs pull"),
}
OBJECT = re.compile(r'\s*\{\s*("(?:[^"\\]|\\.)*"\s*:|\}\s*$)')  # a JSON object, not {a|b}
MAX_LINE = 4 * 10**6  # bytes; two texts of 100,000 characters fit, however they are escaped


def read_entries(
    prompts: str | os.PathLike | Iterable, name: str | None = None, base: Path | None = None
) -> Iterator[Entry]:
    """The entries of a prompt file ("-": standard input), or of a list of texts and groups of settings.

    `name` is what entries call the file, `base` where the paths in it begin (its folder). A bad line is an entry with
    an error. Raises ConfigError for what is wrong with the file as a whole: missing, no text, bad JSON or TOML, a CSV
    without a prompt column.
    """
    if not isinstance(prompts, (str, os.PathLike)):
        for number, item in enumerate(prompts, 1):
            yield make_entry(f"{name or 'prompts'}, entry {number}", number, item, pairs_of_value, Path())
        return
    if os.fspath(prompts) == "-":
        yield from _read(sys.stdin.buffer, name or "stdin", "", Path())
        return
    path = Path(prompts)
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml", ".parquet", ".xlsx"):
        raise ConfigError(f"{suffix} files are not read", where=path, hint="write .txt, .jsonl, .json, .csv or .toml")
    if suffix == ".toml":
        yield from read_toml(path, name or str(path), base or path.parent)
        return
    with open_file(path) as handle:
        yield from _read(handle, name or str(path), suffix, base or path.parent)


def open_prompts(prompts: str | os.PathLike | Iterable) -> Prompts:
    """A prompt file, "-" or a list of prompts, read as far as its first entry.

    Raises ConfigError where there is no such file, or it is refused as a whole, or holds no prompt.
    """
    name = str(Path(prompts)) if isinstance(prompts, (str, os.PathLike)) else "prompts"
    name = "stdin" if name == "-" else name
    entries = read_entries(prompts)
    first = next(entries, None)
    if first is None:
        raise ConfigError("holds no prompts", where=name)
    return Prompts(name, itertools.chain([first], entries))


def is_infotext_file(path: Any) -> bool:
    """Whether this is a text with an image's settings, which A1111 writes beside it, and no list of prompts."""
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).lower().endswith(".txt"):
        return False
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        data = file.read(MAX_TEXT + 1)
    return FIRST_FIELD in data and bool(read_infotexts(data))


def _read(handle: BinaryIO, name: str, suffix: str, base: Path) -> Iterator[Entry]:
    if suffix == ".json":
        yield from read_json(handle, name, base)
        return
    lines = _lines(handle, name)
    first = next(lines, None)
    while first and isinstance(first[1], str) and is_blank(first[1]):
        first = next(lines, None)
    if first is None:
        return
    _refuse_foreign(first[1], name)
    rest = itertools.chain([first], lines)
    if suffix in (".csv", ".tsv") or (suffix not in (".jsonl", ".ndjson") and _is_header(first[1])):
        yield from read_csv(rest, name, base)
        return
    pairs_of = pairs_of_json if suffix in (".jsonl", ".ndjson") else pairs_of_line
    for number, line in rest:
        if isinstance(line, str) and is_blank(line):
            continue
        yield make_entry(f"{name}:{number}", number, line, pairs_of, base)


def pairs_of_line(line: str) -> list[tuple[str, Any]]:
    """The settings that one line of text holds: a JSON object, or words with flags behind them.

    Raises ConfigError: bad JSON, or a flag that is not known.
    """
    return pairs_of_json(line) if OBJECT.match(line) else pairs_of_text(line)


def _refuse_foreign(line: str | ConfigError, name: str) -> None:
    """Raise ConfigError for a file whose lines would be drawn as prompts although they are none."""
    start = line.strip().lower() if isinstance(line, str) else ""
    if start in ("{", "["):
        raise ConfigError("is JSON over several lines", where=name, hint="give it a name that ends in .json")
    for mark, (kind, hint) in FOREIGN.items():
        if start.startswith(mark):
            raise ConfigError(f"is {kind}, no list of prompts", where=name, hint=hint)


def _is_header(line: str | ConfigError) -> bool:
    """Whether a first line that is not in a .csv names columns all the same: `prompt,seed`."""
    if not isinstance(line, str):
        return False
    if EXCEL.fullmatch(line):
        return True
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
            yield number, ConfigError(f"the line is longer than {format_bytes(MAX_LINE)}")
            continue
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            place = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            yield number, ConfigError(f"is not UTF-8 ({place})", hint="save the file as UTF-8")
