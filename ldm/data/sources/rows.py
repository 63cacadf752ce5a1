"""Rows of metadata.csv, .jsonl and .parquet, whose errors name the line; and which column has the captions."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import DataError, first_line, nearest

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_COLUMNS = (
    "text",
    "caption",
    "prompt",
    "texts",
    "captions",
    "prompts",
    "additional_feature",
)  # the first that a table has
HINT = 'write one line an image: {"file_name": "cat.png", "text": "a cat"}'
MAX_LINE = 1 << 20  # bytes
MAX_LIST = 1 << 28  # bytes of a JSON list
SEPARATORS = (",", ";", "\t")  # of a .csv, by its first line


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) for each row of a metadata file; blank lines are skipped. Raises DataError with the line."""
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error})", where=path) from None


def near_miss(names: list[str]) -> str:
    """ " (metadata.json1 is there: did you mean 'metadata.jsonl'?)" for a file with nearly the right name; else ""."""
    similar = sorted(name for name in names if name.lower().startswith(("metadata", "meta_data", "_metadata")))
    return f" ({similar[0]} is there: {nearest(similar[0], METADATA)})" if similar else ""


def decoded_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file with their ends, without a byte order mark. Raises DataError with line and byte."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE:
                raise DataError("is longer than a megabyte", where=where)
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError("is UTF-16", where=path, hint="save it as UTF-8")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f"is not UTF-8 (byte {offset + error.start})"
                raise DataError(what, where=where, hint="save it as UTF-8") from None
            offset += len(line)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if (rows := _listed_rows(path)) is not None:
        yield from ((f"{path}, object {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(decoded_lines(path), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON ({error})", where=where) from None
        if not isinstance(row, dict):
            raise DataError(f"expected an object, got {type(row).__name__}", where=where, hint=HINT)
        yield where, row


def _listed_rows(path: Path) -> list[dict[str, Any]] | None:
    """The rows of a file that is one JSON list of objects, as some tools write it; None for any other."""
    with path.open("rb") as file:
        if not file.read(100).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") or path.stat().st_size > MAX_LIST:
            return None
        file.seek(0)
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
    return rows if rows and all(isinstance(row, dict) for row in rows) else None


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = decoded_lines(path)
    header = next(lines, "")
    separator = max(SEPARATORS, key=header.count)  # "," where there is none
    if header.lower().startswith("sep="):  # Excel's own line
        separator, header = header[4:5], next(lines, "")
    reader = csv.DictReader(itertools.chain([header], lines), strict=True, delimiter=separator)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                columns = f"expected {len(reader.fieldnames)} columns"
                raise DataError(columns, where=where, hint=f"quote texts with {separator!r} in them")
            yield where, row
    except csv.Error as error:
        raise DataError(f"is not CSV ({error})", where=f"{path}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"is not a sound parquet file ({first_line(error)})", where=path) from None


def rivals(columns: Sequence[str]) -> list[str]:
    """A line about the other columns that could be the captions; [] where there is none."""
    found = [name for name in columns if name and name.lower() in CAPTION_COLUMNS]
    read = caption_column(found)
    others = ", ".join(repr(name) for name in found if name != read)
    return [f"captions are read from {read!r}, not from {others}"] if others else []


def caption_column(columns: Sequence[str]) -> str | None:
    """The column that holds the captions, by its name in any case."""
    named = {column.lower(): column for column in reversed(columns)}
    return next((named[name] for name in CAPTION_COLUMNS if name in named), None)
