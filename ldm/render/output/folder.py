"""What a folder of rendered images holds, by its manifests and reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError
from ldm.render.output.lines import DONE, is_inside, last_lines


def finished(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The manifests' lines of the images that are drawn, in the order of the prompt file.

    Raises ConfigError where there is no manifest.
    """
    folder = Path(folder)
    if not any(folder.glob("manifest*.jsonl")):
        raise ConfigError("holds no manifest.jsonl", where=folder, hint="give a folder that ldm render wrote")
    lines = (line for line in last_lines(folder) if line["status"] == DONE and is_inside(line.get("path")))
    return sorted((line for line in lines if isinstance(line.get("settings"), dict)), key=_order)


def _order(line: dict[str, Any]) -> tuple[int, str]:
    index = line.get("index")
    return index if isinstance(index, int) else 0, str(line.get("time"))


def failures(folder: str | os.PathLike) -> list[str]:
    """A line for each job that failed and was not drawn since, and of the last run's bad lines."""
    lines = sorted((line for line in last_lines(folder) if line["status"] != DONE), key=_order)
    return [f"{line.get('where')}: {line.get('error')}" for line in lines] + list(_bad_lines(Path(folder)))


def _bad_lines(folder: Path) -> Iterator[str]:
    seen = set()  # shards read the same prompt file
    for path in sorted(folder.glob("report*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                message = entry["kind"] == "bad line" and str(entry["message"])
            except (ValueError, LookupError, TypeError, RecursionError):
                continue
            if message and message not in seen:
                seen.add(message)
                yield message
