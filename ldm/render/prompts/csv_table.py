"""Prompt files that are tables: the first line names the settings, each record is an entry."""

from __future__ import annotations

import csv
import itertools
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.render.prompts.entry import Entry, Lines, is_blank, is_comment, make_entry
from ldm.render.prompts.line_settings import WORDS, find_word, parse_settings

EXCEL = re.compile(r"sep=(.)\s*")


class _Records:
    """Feeds csv.reader with lines, and after a bad record once more with all its lines but the first."""

    def __init__(self, lines: Lines):
        self._lines, self._again, self.taken = lines, deque(), []

    def __iter__(self) -> _Records:
        return self

    def __next__(self) -> str:
        while True:
            number, line = self._again.popleft() if self._again else next(self._lines)
            if self.taken or isinstance(line, ConfigError) or not is_blank(line):
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


def read_csv(lines: Lines, name: str, base: Path) -> Iterator[Entry]:
    first = next(lines)
    named = None if isinstance(first[1], ConfigError) else EXCEL.fullmatch(first[1])  # the line before its header
    first = next(lines, first) if named else first
    if isinstance(first[1], ConfigError):
        raise ConfigError(first[1].what, where=f"{name}:{first[0]}", hint=first[1].hint)
    delimiter = named[1] if named else max(",;\t", key=first[1].count)
    records = _Records(itertools.chain([first], lines)).records(delimiter)
    number, header = next(records)
    _check_header(header, f"{name}:{number}")

    def pairs_of(row: list[str]) -> list[tuple[str, Any]]:
        if len(row) > len(header):
            raise ConfigError(f"{len(row)} cells in {len(header)} columns", hint="put texts that hold commas in quotes")
        return [(word, cell) for word, cell in zip(header, row) if cell.strip() and not is_comment(word)]

    for number, row in records:
        yield make_entry(f"{name}:{number}", number, row, pairs_of, base)


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
