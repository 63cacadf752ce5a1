"""What outlives the server: the ledger of jobs and images (SQLite), and the files that it names.

An image is written whole before the ledger names it, and only what the ledger names is ever read for a client. Files
are named by opaque ids; no text of a client becomes part of a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from ldm.errors import ResourceError
from ldm.files import Lock, atomic_write, disk_errors, format_bytes, require_space, sweep
from ldm.web.limits import FREE_BYTES, KEPT_JOBS, Refused

ID = re.compile(r"[0-9a-f]{16}-\d{1,4}")
TABLES = """
create table if not exists jobs (
  id text primary key, client text, created real, state text, request text, error text);
create table if not exists images (
  id text primary key, job text, created real, bytes integer, width integer, height integer, kind text, metadata text);
create index if not exists images_by_time on images (created, id);
"""


class Store:
    """The ledger of a folder, and the folder's images. Safe to use from several threads; one server a folder."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.inputs, self.max_bytes = folder, folder / ".web" / "inputs", max_bytes
        with disk_errors(folder):
            self.inputs.mkdir(parents=True, exist_ok=True)
        self._lock_file = Lock(folder)
        self._lock_file.__enter__()
        sweep(folder)
        self._lock = threading.RLock()
        try:
            self._db = sqlite3.connect(
                folder / ".web" / "ledger.sqlite3", check_same_thread=False, isolation_level=None
            )
            self._db.execute("pragma journal_mode=wal")
            self._db.executescript(TABLES)
        except sqlite3.Error as error:
            self._lock_file.__exit__()
            hint = "remove the folder .web in it to begin a new ledger; the images stay"
            raise ResourceError(f"the ledger cannot be used ({error})", where=folder, hint=hint) from None

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._lock_file.__exit__()

    def _ask(self, sql: str, *values: Any) -> list[tuple]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def require_room(self) -> None:
        """Raise Refused(507) where the disk or the folder's share of it is full."""
        try:
            require_space(self.folder, FREE_BYTES)
        except ResourceError:
            raise Refused(507, "the disk is nearly full", hint="free some disk space") from None
        ((used,),) = self._ask("select coalesce(sum(bytes), 0) from images")
        if used > self.max_bytes:
            raise Refused(507, f"the gallery holds {format_bytes(used)}", hint="delete images, or raise --max-gb")

    # jobs

    def save_job(self, id: str, client: str, created: float, request: dict[str, Any]) -> None:
        with self._changing():
            self._db.execute(
                "insert into jobs values (?, ?, ?, 'queued', ?, null)", (id, client, created, json.dumps(request))
            )
            self._db.execute(
                "delete from jobs where state not in ('queued', 'running') and id not in "
                "(select id from jobs order by created desc limit ?)",
                (KEPT_JOBS,),
            )

    def set_state(self, id: str, state: str, error: str | None = None) -> None:
        self._ask("update jobs set state = ?, error = ? where id = ?", state, error, id)

    def job(self, id: str) -> dict[str, Any] | None:
        """A job of the ledger with its images, or None."""
        rows = self._ask("select id, created, state, request, error from jobs where id = ?", id)
        if not rows:
            return None
        id, created, state, request, error = rows[0]
        images = [row[0] for row in self._ask("select id from images where job = ? order by created, id", id)]
        return {
            "id": id,
            "created": created,
            "state": state,
            "request": json.loads(request),
            "error": error,
            "images": images,
        }

    def unfinished(self) -> list[tuple[str, str, float, dict[str, Any]]]:
        """(id, client, created, request) of each job that waits or was at work when the server ended, in order."""
        rows = self._ask("select id, client, created, request from jobs where state in ('queued', 'running') "
                         "order by created, id")  # fmt: skip
        return [(id, client, created, json.loads(request)) for id, client, created, request in rows]

    # images

    def add_image(
        self, id: str, job: str, data: bytes, size: tuple[int, int], metadata: dict[str, Any], kind: str = "image"
    ) -> None:
        """Write an image's file, then its line. Raises ResourceError where the disk is full."""
        atomic_write(self.folder / f"{id}.png", data)
        self._ask(
            "insert or replace into images values (?, ?, ?, ?, ?, ?, ?, ?)",
            id, job, time.time(), len(data), *size, kind, json.dumps(metadata),
        )  # fmt: skip

    def has_image(self, id: str) -> bool:
        return bool(self._ask("select 1 from images where id = ?", id)) and (self.folder / f"{id}.png").is_file()

    def image_bytes(self, id: str) -> bytes | None:
        """The file of an image of the ledger; None for any other id, and for a file that is gone or is a link."""
        if not ID.fullmatch(id) or not self._ask("select 1 from images where id = ?", id):
            return None
        try:
            handle = os.open(self.folder / f"{id}.png", os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        with os.fdopen(handle, "rb") as file:
            return file.read()

    def image(self, id: str) -> dict[str, Any] | None:
        rows = self._ask(f"select {_COLUMNS} from images where id = ?", id) if ID.fullmatch(id) else []
        return _image(rows[0]) if rows else None

    def images(self, limit: int, before: str | None = None) -> list[dict[str, Any]]:
        """The newest images, or those older than the image `before`."""
        if before is None:
            rows = self._ask(f"select {_COLUMNS} from images order by created desc, id desc limit ?", limit)
        else:
            rows = self._ask(
                f"select {_COLUMNS} from images where (created, id) < (select created, id from images where id = ?) "
                "order by created desc, id desc limit ?",
                before, limit,
            )  # fmt: skip
        return [_image(row) for row in rows]

    def delete_image(self, id: str) -> bool:
        """Remove an image's line, then its file; False where the ledger has none."""
        if not ID.fullmatch(id) or not self._ask("delete from images where id = ? returning id", id):
            return False
        with contextlib.suppress(OSError):
            (self.folder / f"{id}.png").unlink()
        return True

    # images to begin at

    def add_input(self, data: bytes) -> str:
        """Keep a PNG that a job begins at, once; returns its digest."""
        digest = hashlib.sha256(data).hexdigest()[:32]
        path = self.inputs / f"{digest}.png"
        if not path.is_file():
            atomic_write(path, data)
        return digest

    def input_bytes(self, digest: str) -> bytes | None:
        if not re.fullmatch(r"[0-9a-f]{32}", digest):
            return None
        try:
            return (self.inputs / f"{digest}.png").read_bytes()
        except OSError:
            return None

    def sweep_inputs(self) -> None:
        """Remove the images to begin at that no job and no image of the ledger names."""
        named = " ".join(row[0] for row in self._ask("select request from jobs union all select metadata from images"))
        for path in self.inputs.glob("*.png"):
            if path.stem not in named:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _changing(self):
        with self._lock:
            self._db.execute("begin immediate")
            try:
                yield
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")


_COLUMNS = "id, job, created, bytes, width, height, kind, metadata"


def _image(row: tuple) -> dict[str, Any]:
    id, job, created, size, width, height, kind, metadata = row
    values = {"id": id, "job": job, "created": created, "bytes": size, "width": width, "height": height, "kind": kind}
    return {**values, "url": f"/images/{id}.png", "metadata": json.loads(metadata)}


def new_id() -> str:
    return secrets.token_hex(8)
