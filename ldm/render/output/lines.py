"""Reading the lines of manifests, this run's, others' and damaged ones."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.render.jobs.digest_table import Table

DONE, FAILED = "done", "failed"  # a line's status


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A manifest's line, or None where it is none."""
    try:
        entry = json.loads(line)
        good = len(bytes.fromhex(entry["key"])) == 16 and isinstance(entry["status"], str)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return entry if good and line.endswith(b"\n") else None


def is_inside(name: Any) -> bool:
    """Whether a manifest's path is the name of a file in its own folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(mark in name for mark in "/\\\0")


def read_manifest(folder: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The lines of all manifests of a folder, shard by shard, as they were written; half-written ones are left out."""
    yield from _entries(sorted(Path(folder).glob("manifest*.jsonl")))


def last_lines(place: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The line that counts of each job in a manifest, or in all of a folder: "done" before others, then the last."""
    place = Path(place)
    paths = sorted(place.glob("manifest*.jsonl")) if place.is_dir() else [place]
    counts = Table()
    for number, entry in enumerate(_entries(paths), 1):
        key, value = bytes.fromhex(entry["key"]), 2 * number + (entry["status"] == DONE)
        before = counts.get(key) or 0
        if value % 2 >= before % 2:
            counts.set(key, value)
    for number, entry in enumerate(_entries(paths), 1):
        if (counts.get(bytes.fromhex(entry["key"])) or 0) // 2 == number:
            yield entry


def _entries(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        try:
            with path.open("rb") as handle:
                yield from (entry for line in handle if (entry := parse_line(line)) is not None)
        except OSError as error:
            raise ConfigError(f"cannot be read ({error.strerror or error})", where=path) from None
