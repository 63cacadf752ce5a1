"""The first images of a stream, kept in a temporary file so that they can be read more than once."""

from __future__ import annotations

import io
import os
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from ldm.console import progress
from ldm.data.sources.source import Sample, Source
from ldm.files import disk_errors


class SampledSource(Source):
    """Samples whose files lie one after the other in a temporary file, which is deleted with this object."""

    def __init__(self, stream: Source, count: int):
        """Read until there are `count` usable images or the stream ends. Raises DataError, ResourceError."""
        with disk_errors(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(prefix="ldm-sampled-")  # noqa: SIM115, as long as the object
        self.rows, size = [], 0
        for sample in progress(islice(stream, count), total=count, desc="first images", unit="image"):
            with sample.open() as opened, disk_errors(Path(tempfile.gettempdir())):
                length = self._file.write(opened.read())
                self._file.flush()
            self.rows.append((sample.id, sample.captions, sample.repeats, sample.where, size, length))
            size += length
        self.ended = len(self.rows) < count  # the stream has no more
        super().__init__(stream.path, f"{stream.layout}, the first {len(self.rows)}", stream.counts, len(self.rows))
        self.no_captions = stream.no_captions

    def _sample(self, position: int) -> Sample:
        id, captions, repeats, where, begin, length = self.rows[position]
        return Sample(id, captions, repeats, where, partial(self._read, begin, length))

    def _read(self, begin: int, length: int) -> BinaryIO:
        return io.BytesIO(os.pread(self._file.fileno(), length, begin))
