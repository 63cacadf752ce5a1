"""Parquet files with a column of images as bytes and a column of captions."""

from __future__ import annotations

import bisect
import io
import os
from array import array
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from ldm.console import progress
from ldm.data.images import MAX_FILE, ImageError
from ldm.data.sources.rows import caption_column, rivals
from ldm.data.sources.source import Counts, Sample, Source, captions_of
from ldm.errors import DataError, first_line

BATCH = 16_000_000  # bytes of images that are read at once
READ_AHEAD = 1 << 20  # bytes
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "picture", "img", "image_bytes", "bytes", "pixel_values")
HINT = "a column of images as bytes (or struct<bytes, path>) and a column 'text' are needed"


class ParquetSource(Source):
    """Rows of parquet files, BATCH bytes in memory at a time. Read in order, each file is read once."""

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
    data, reason = image_bytes(file.images.get(number))
    if reason:
        raise ImageError(reason, where=where)
    return io.BytesIO(data)


def image_bytes(value: Any) -> tuple[bytes, str]:
    """(bytes, reason) of a field, which is bytes or {"bytes": …, "path": …}; one of the two is empty."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return b"", "holds a path in place of an image"
        value = value.get("bytes")
    if not isinstance(value, bytes):
        return b"", "holds no image"
    return (b"", "file is too large") if len(value) > MAX_FILE else (value, "")


class _Column:
    """One column of a file, by row: keeps the rows around the last one that was read."""

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
            raise ImageError("is not a sound parquet file", detail, where=f"{self.path}#{row}") from None
        return self.values[row - self.begin].as_py()


class _File:
    """A parquet file with its image and caption columns; `start` is its first row in the source."""

    def __init__(self, path: Path, name: str, start: int):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.name, self.start = path, name, start
        try:
            with pq.ParquetFile(path) as table:
                schema, groups = table.schema_arrow, [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataError(f"is not a sound parquet file ({first_line(error)})", where=path) from None
        self.image_column, self.text_column = _image_column(schema), caption_column(schema.names)
        self.rivals = rival_images(_image_columns(schema)[0], self.image_column)
        self.columns = schema.names
        rows = [group.num_rows for group in groups]
        self.rows = sum(rows)
        at_once = [max(1, min(g.num_rows, g.num_rows * BATCH // max(1, g.total_byte_size))) for g in groups]
        self.images = _Column(path, self.image_column, rows, at_once) if self.image_column else None
        self.captions = _Column(path, self.text_column, rows, rows) if self.text_column else _None()


class _None:
    def get(self, row: int) -> None:
        return None


def _image_column(schema) -> str | None:
    """The column of images: see `choose_image_column`."""
    return choose_image_column(*_image_columns(schema))


def _image_columns(schema) -> tuple[list[str], list[str]]:
    """The columns of {"bytes", "path"}, and those of bytes."""
    import pyarrow as pa

    structs = [field for field in schema if pa.types.is_struct(field.type)]
    images = [f.name for f in structs if "bytes" in [f.type.field(i).name for i in range(f.type.num_fields)]]
    return images, [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]


def choose_image_column(images: Sequence[str], plain: Sequence[str]) -> str | None:
    """A usual name among the columns of images, else the first of these; else a usual name among columns of bytes."""
    named = [name for usual in IMAGE_COLUMNS for name in images or plain if name.lower() == usual]
    return next(iter([*named, *images]), None)


def rival_images(images: Sequence[str], chosen: str | None) -> list[str]:
    """A line about the other columns of images; [] where there is none."""
    others = ", ".join(repr(name) for name in images if name != chosen)
    return [f"images are read from {chosen!r}, not from {others}"] if chosen in images and others else []


def count_images(path: Path) -> int:
    """The rows of a parquet file with a column of images; 0 for any other file."""
    try:
        file = _File(path, path.name, 0)
    except DataError:
        return 0
    return file.rows if file.image_column else 0


def open_parquet(path: Path, root: Path, names: list[str]) -> ParquetSource:
    """The source of these files below `root`. Raises DataError for damaged files and files without images."""
    files, counts, rows, start = [], Counts(), array("q"), 0
    for name in names:
        file = _File(root / name, name, start)
        if file.image_column is None:
            listed = ", ".join(map(repr, file.columns))
            raise DataError(f"has no column of images: the columns are {listed}", where=file.path, hint=HINT)
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
            counts.use(f"{file.name}#{number}", texts, has_caption=value is not None)
            rows.append(file.start + number)
    columns = sorted({file.text_column for file in files if file.text_column})
    caption_columns = " and ".join(map(repr, columns)) or "no column"
    number = "one file" if len(files) == 1 else f"{len(files)} files"
    layout = f"parquet: {number}, images in {files[0].image_column!r}, captions in {caption_columns}"
    counts.notes += rivals(files[0].columns) + files[0].rivals
    source = ParquetSource(path, root, layout, counts, files, rows)
    listed = ", ".join(map(repr, files[0].columns))
    what = f"holds no captions: the columns are {listed}"
    source.no_captions = DataError(what, where=path, hint="name the column of captions 'text'")
    return source
