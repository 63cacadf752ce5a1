"""Parquet files that hold pictures as bytes beside their captions."""

from __future__ import annotations

import bisect
import io
import os
from array import array
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ldm.console import progress
from ldm.data.images import MAX_FILE, PictureError
from ldm.data.sources.source import Counts, Sample, Source, caption_column, captions_of
from ldm.errors import DataError, first_line

BATCH = 16_000_000  # bytes of pictures that are read at once
READ_AHEAD = 1 << 20  # bytes
PICTURES = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "image_bytes", "bytes", "pixel_values")
TODO = "a column of pictures as bytes (or struct<bytes, path>) and a column 'text' are needed"


class ParquetSource(Source):
    """Rows of parquet files; as many of them as BATCH holds are in memory at a time. In order it is read once."""

    def __init__(self, path: Path, root: Path, layout: str, counts: Counts, files: list[_File], rows: array):
        super().__init__(path, layout, counts, len(rows))
        self.root, self.files, self.rows = root, files, rows
        self.starts = [file.start for file in files]

    def _sample(self, position: int) -> Sample:
        row = self.rows[position]
        file = self.files[bisect.bisect_right(self.starts, row) - 1]
        number = row - file.start
        texts, _ = captions_of(file.captions.get(number))
        where = f"{file.name}#{number}"
        return Sample(where, texts, 1, f"{self.root}/{where}", partial(_bytes, file, number, f"{self.root}/{where}"))


def _bytes(file: _File, number: int, where: str) -> BinaryIO:
    data, reason = picture_bytes(file.pictures.get(number))
    if reason:
        raise PictureError(reason, where=where)
    return io.BytesIO(data)


def picture_bytes(value: Any) -> tuple[bytes, str]:
    """(bytes, reason why there are none) of a field: bytes, or {"bytes": …, "path": …}."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return b"", "holds a path in place of a picture"
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return b"", "holds no picture"
    return (b"", "file is too large") if len(value) > MAX_FILE else (value, "")


class _Column:
    """One column of a file, by row: keeps the rows around the last one that was asked for."""

    def __init__(self, path: Path, name: str, groups: list[int], rows_at_once: list[int]):
        self.path, self.name = path, name
        self.starts, total = [], 0
        for rows in groups:
            self.starts.append(total)
            total += rows
        self.rows_at_once = rows_at_once
        self._forget()

    def _forget(self) -> None:
        self.group, self.begin, self.values, self.batches, self.process = -1, 0, [], None, os.getpid()

    def __getstate__(self) -> dict:  # workers open the file themselves
        return {**self.__dict__, "group": -1, "begin": 0, "values": [], "batches": None}

    def get(self, row: int) -> Any:
        """Raises DataError where the file is damaged there."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        group = bisect.bisect_right(self.starts, row) - 1
        try:
            if group != self.group or row < self.begin or self.process != os.getpid():
                self._forget()
                self.group, self.begin = group, self.starts[group]
                size = self.rows_at_once[group]
                # by default the whole column of a row group is read at once
                table = pq.ParquetFile(self.path, pre_buffer=False, buffer_size=READ_AHEAD)
                self.batches = table.iter_batches(size, row_groups=[group], columns=[self.name])
            while row >= self.begin + len(self.values):
                self.begin += len(self.values)
                self.values = next(self.batches).column(0)
        except (OSError, pa.ArrowException, StopIteration) as error:
            self._forget()
            detail = "rows are missing" if isinstance(error, StopIteration) else first_line(error)
            raise PictureError("is not a sound parquet file", detail, where=f"{self.path}#{row}") from None
        return self.values[row - self.begin].as_py()


class _File:
    """A parquet file: its rows from `start` on, and its two columns."""

    def __init__(self, path: Path, name: str, start: int):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.name, self.start = path, name, start
        try:
            with pq.ParquetFile(path) as table:
                schema, groups = table.schema_arrow, [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataError(f"is not a sound parquet file ({first_line(error)})", where=path) from None
        self.picture, self.caption = _picture_column(schema), caption_column(schema.names)
        self.columns = schema.names
        rows = [group.num_rows for group in groups]
        self.rows = sum(rows)
        at_once = [max(1, min(g.num_rows, g.num_rows * BATCH // max(1, g.total_byte_size))) for g in groups]
        self.pictures = _Column(path, self.picture, rows, at_once) if self.picture else None
        self.captions = _Column(path, self.caption, rows, rows) if self.caption else _None()


class _None:
    def get(self, row: int) -> None:
        return None


def _picture_column(schema) -> str | None:
    """The first column of {"bytes", "path"}; without one the bytes whose name says that they are a picture."""
    import pyarrow as pa

    for field in schema:
        if pa.types.is_struct(field.type) and "bytes" in [
            field.type.field(i).name for i in range(field.type.num_fields)
        ]:
            return field.name
    plain = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    return next((name for wanted in PICTURES for name in plain if name.lower() == wanted), None)


def open_parquet(path: Path, root: Path, names: list[str]) -> ParquetSource:
    """The source of these files below `root`. Raises DataError for damaged files and such without pictures."""
    files, counts, rows, start = [], Counts(), array("q"), 0
    for name in names:
        file = _File(root / name, name, start)
        if file.picture is None:
            listed = ", ".join(map(repr, file.columns))
            raise DataError(f"has no column of pictures: the columns are {listed}", where=file.path, todo=TODO)
        files.append(file)
        start += file.rows
    for file in files:
        for number in progress(range(file.rows), desc=f"captions of {file.name}", unit="row"):
            counts.found += 1
            value = file.captions.get(number)
            texts, fault = captions_of(value)
            if fault:
                counts.skip(f"{file.path}#{number}", fault)
                continue
            counts.use(f"{file.name}#{number}", texts, there=value is not None)
            rows.append(file.start + number)
    columns = sorted({file.caption for file in files if file.caption})
    said = " and ".join(map(repr, columns)) or "no column"
    number = "one file" if len(files) == 1 else f"{len(files)} files"
    layout = f"parquet: {number}, pictures in {files[0].picture!r}, captions in {said}"
    source = ParquetSource(path, root, layout, counts, files, rows)
    listed = ", ".join(map(repr, files[0].columns))
    what = f"holds no captions: the columns are {listed}"
    source.no_captions = DataError(what, where=path, todo="name the column of captions 'text'")
    return source
