"""What was rendered: `manifest.jsonl`, one line a job, written after its file; and `report.jsonl`, what was not.

Each shard writes its own manifest and all are read. A line reaches the kernel before the next image is begun, so that a
killed process loses none; it is forced to the disk every 5 seconds and at the end. Images are forced to the disk before
their line is written: after a power failure at most the lines of the last 5 seconds are missing, and their images are
drawn again, found to be there, and kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import LdmError, ResourceError
from ldm.files import Lock, atomic_write, disk_errors, require_writable, sha256, sweep
from ldm.render.jobs.digest_table import Table
from ldm.render.jobs.job_file import JobFile
from ldm.render.jobs.jobs import Job, Shard
from ldm.render.jobs.scan import Scan
from ldm.render.output.lines import DONE, FAILED, is_inside, parse_line
from ldm.render.prompts.entry import Entry

SYNC_EVERY = 5.0  # seconds
STATE = ".render"  # holds, for each shard, its lock, its unfinished files and its jobs
_OFFSET = 40  # bits of a line's place in its file; above them the file's number


class Manifest:
    """The manifests of a folder, open for the jobs of one shard: `with Manifest(folder) as manifest`.

    Entering takes the shard's lock, removes what a killed run left unfinished, and cuts a torn last line off. Raises
    ResourceError where another process holds the lock or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, shard: Shard | None = None, suffix: str = ".png"):
        self.folder, self.suffix, self._shard = Path(folder), suffix, shard or Shard()
        self._state = self.folder / STATE / f"{self._shard.number}-of-{self._shard.of}"
        self._done = Table()  # key -> place of its "done" line
        self._files: list[BinaryIO] = []
        self.damaged = 0  # lines that could not be read

    def __enter__(self) -> Manifest:
        with ExitStack() as stack:
            stack.enter_context(Lock(self._state))
            require_writable(self.folder)
            sweep(self._state)
            written = self.folder / self._shard.file("manifest")
            self._log = stack.enter_context(_Log(written))
            others = sorted(path for path in self.folder.glob("manifest*.jsonl") if path != written)
            for path in [written, *others]:
                self._files.append(stack.enter_context(path.open("rb")))
                self._index(len(self._files) - 1)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc) -> None:
        self._stack.close()

    def __len__(self) -> int:
        """How many jobs the folder's manifests call done, of any prompt file."""
        return len(self._done)

    def job_file(self) -> JobFile:
        """For the jobs of this run; the shard's lock, which this manifest holds, keeps others from it."""
        return JobFile(self.folder / STATE / self._shard.file("jobs"))

    def _index(self, number: int) -> None:
        place = 0
        for line in self._files[number]:
            entry = parse_line(line)
            if entry is None:
                self.damaged += line.endswith(b"\n")  # another shard's last line may be half-written
            elif entry["status"] == DONE:
                self._done.set(bytes.fromhex(entry["key"]), number << _OFFSET | place)
            place += len(line)

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The manifest's line of a job that is done and whose file is there, or None."""
        place = self._done.get(bytes.fromhex(job.key))
        if place is None:
            return None
        handle = self._files[place >> _OFFSET]
        handle.seek(place & ((1 << _OFFSET) - 1))
        entry = parse_line(handle.readline())
        if entry is None or entry["key"] != job.key or not is_inside(entry.get("path")):
            return None
        return entry if (self.folder / entry["path"]).is_file() else None

    def save(self, job: Job, data: bytes, **more: Any) -> dict[str, Any]:
        """Write a job's image, then its line, and return the line. `more` is kept in it (time taken, notes).

        A file is never overwritten: where the name is taken, the key is put behind it. A file that is there and is this
        job's (equal bytes, or the key inside) stays untouched. Raises ResourceError (disk full) with nothing half-done.
        """
        path, digest = self._publish(job, data)
        line = {"status": DONE, **_about(job), "path": path.name, "sha256": digest, **more}
        place = self._log.append(line)
        self._done.set(bytes.fromhex(job.key), place)  # the file that is written is number 0
        return line

    def fail(self, job: Job, error: LdmError, **more: Any) -> dict[str, Any]:
        """Write the line of a job that could not be drawn, and return it; the next run tries again."""
        line = {"status": FAILED, **_about(job), "path": None, "sha256": None, "error": str(error), **more}
        self._log.append(line)
        return line

    def _publish(self, job: Job, data: bytes) -> tuple[Path, str]:
        """(the file that holds the image, its sha256)."""
        digest = hashlib.sha256(data).hexdigest()
        for stem in job.stems():
            path = self.folder / f"{stem}{self.suffix}"
            if path.parent != self.folder:
                raise AssertionError(f"a name left its folder: {stem!r}")
            try:
                atomic_write(path, data, overwrite=False, scratch=self._state)
                return path, digest
            except FileExistsError:
                existing = self._digest_of_same(path, job, digest)
                if existing:
                    return path, existing
        raise ResourceError("three files with this job's names are there already", where=path, hint="move them away")

    def _digest_of_same(self, path: Path, job: Job, digest: str) -> str | None:
        """The sha256 of a file that is this job's image, written by a run that was killed before its line was."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 30:
            return None
        existing = sha256(path)
        return existing if existing == digest or job.key.encode() in path.read_bytes() else None


def _about(job: Job) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    about = {"time": now, "key": job.key, "index": job.index, "where": job.where}
    return {**about, "seed": job.seed, "settings": dict(job.settings)}


class _Log:
    """A file of JSON lines that grows by whole lines; a torn last one is cut off on opening."""

    def __init__(self, path: Path, fresh: bool = False):
        self._path, self._fresh = path, fresh

    def __enter__(self) -> _Log:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with disk_errors(self._path):
            self._handle = os.open(self._path, flags, 0o666)
            self._size = 0 if self._fresh else _whole_lines(self._handle)
            os.ftruncate(self._handle, self._size)
        self._synced = time.monotonic()
        return self

    def __exit__(self, *_exc) -> None:
        try:
            with disk_errors(self._path):
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def append(self, line: Mapping[str, Any]) -> int:
        """Add a line and return where it begins. Raises ResourceError with the file as it was."""
        data = json.dumps(line, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n"
        with disk_errors(self._path):
            try:
                written = os.write(self._handle, data)
                while written < len(data):  # the rest of a full disk, or a signal
                    written += os.write(self._handle, data[written:])
            except OSError:
                os.ftruncate(self._handle, self._size)
                raise
            if time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(self._handle)
                self._synced = time.monotonic()
        start, self._size = self._size, self._size + len(data)
        return start


def _whole_lines(handle: int, block: int = 1 << 16) -> int:
    """How many bytes of a file end in a line end."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - block)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


class Report:
    """`report.jsonl` of one run: every bad line and failure as it happens, then a line of counts that add up."""

    def __init__(self, folder: str | os.PathLike, shard: Shard | None = None):
        self.path = Path(folder) / (shard or Shard()).file("report")
        self.rendered = self.failures = 0

    def __enter__(self) -> Report:
        self._log = _Log(self.path, fresh=True).__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self._log.__exit__(*exc)

    def bad_line(self, entry: Entry) -> None:
        """Write down a line of the prompt file that cannot be drawn."""
        self._write("bad line", entry.where, entry.field, entry.error, line=entry.line, text=entry.text)

    def failed(self, job: Job, error: LdmError) -> None:
        """Count and write down a job that could not be drawn."""
        self.failures += 1
        self._write("failed", job.where, None, error, key=job.key, seed=job.seed)

    def counts(self, scan: Scan) -> dict[str, int]:
        """What became of all lines and jobs; what is left where a run was stopped is `not_reached`."""
        return scan.counts(self.rendered, self.failures)

    def finish(self, scan: Scan) -> None:
        """Write the line of counts. Raises ResourceError where the disk is full."""
        self._log.append({"kind": "counts", **self.counts(scan)})

    def _write(self, kind: str, where: str, field: str | None, error: LdmError, **more: Any) -> None:
        line = {"kind": kind, "where": where, "field": field, "what": error.what, "todo": error.hint}
        self._log.append({**line, "message": str(error), **more})
