"""The resolved jobs of a run on their way from the first pass, which finds them, to the drawing: `.render/jobs.jsonl`.

Memory does not grow with the number of jobs. The file lives as long as its run; one that a killed run left is replaced,
since the next run resolves its lines anew.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.files import disk_errors
from ldm.render.jobs.jobs import Job


class JobFile:
    """Jobs and sheets, written once and then read: `with JobFile(path) as job_file`.

    path  of the file, in a folder that is there; None: a temporary file

    Raises ResourceError where the disk is full or the file cannot be written.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._count = 0

    def __enter__(self) -> JobFile:
        if self._path is None:
            self._handle = tempfile.TemporaryFile()
        else:
            with disk_errors(self._path):
                self._handle = self._path.open("w+b")
        return self

    def __exit__(self, *_exc: Any) -> None:
        if self._path is None:
            self._handle.close()
            return
        self._path.unlink(missing_ok=True)  # first: closing writes what a full disk refused
        with disk_errors(self._path):
            self._handle.close()

    def __len__(self) -> int:
        """How many jobs it holds."""
        return self._count

    def add(self, job: Job) -> None:
        """Append a job."""
        line = {"index": job.index, "key": job.key, "where": job.where, "stem": job.stem, "settings": job.settings}
        self._write(line if job.source is None else {**line, "source": job.source})
        self._count += 1

    def add_sheet(self, title: str, keys: Sequence[int | None]) -> None:
        """Append a grid's sheet: its title, and `short` of the key of the job in each cell, None for a bad cell."""
        self._write({"sheet": title, "keys": keys})

    def _write(self, line: dict[str, Any]) -> None:
        with disk_errors(self._path or Path(tempfile.gettempdir())):
            self._handle.write(json.dumps(line).encode() + b"\n")

    def jobs(self) -> Iterator[Job]:
        """The jobs, in the order in which they were added."""
        return (Job(**line) for line in self._lines() if "sheet" not in line)

    def sheets(self) -> Iterator[tuple[str, list[int | None]]]:
        """(title, keys) of the sheets."""
        return ((line["sheet"], line["keys"]) for line in self._lines() if "sheet" in line)

    def _lines(self) -> Iterator[dict[str, Any]]:
        with disk_errors(self._path or Path(tempfile.gettempdir())):
            self._handle.flush()
        self._handle.seek(0)
        return map(json.loads, self._handle)
