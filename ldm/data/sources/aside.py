"""What of a folder is not read: links that lead out of it, and files that patterns leave out on request."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import Counter
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path, PurePosixPath

from ldm.data.sources.lost import ELSEWHERE
from ldm.data.sources.source import Skip
from ldm.errors import DataError
from ldm.images import SUFFIXES

MOST = 100_000  # files that are looked at behind a link to a folder


def homes_of(root: Path) -> tuple[str, ...]:
    """The folders that links may lead into: the root, and the contents of a hub's snapshot, if the root lies in one."""
    for folder in (root, *root.parents):
        repository = folder.parents[1] if len(folder.parents) > 1 else folder
        if folder.parent.name == "snapshots" and "--" in repository.name and (repository / "blobs").is_dir():
            return f"{root}{os.sep}", f"{os.path.realpath(repository / 'blobs')}{os.sep}"
    return (f"{root}{os.sep}",)


def fault_of_link(link: str, homes: tuple[str, ...]) -> tuple[str, str] | None:
    """(reason, detail) why a link leads to no regular file in one of these folders, or None."""
    try:
        target = os.path.realpath(link)
        mode = os.stat(target).st_mode
    except OSError:
        return "is a link that leads nowhere", ""
    if stat.S_ISDIR(mode):
        return "is a link to a folder", ""
    if not target.startswith(homes):
        return ELSEWHERE, f"into {os.path.dirname(target)}"
    return None if stat.S_ISREG(mode) else ("is no file", "a pipe, socket or device")


def behind(link: str, where: str, homes: tuple[str, ...]) -> list[Skip]:
    """One for each image in a folder outside, to which a link leads: they are not followed."""
    target = os.path.realpath(link)
    if not os.path.isdir(target) or f"{target}{os.sep}".startswith(homes):
        return []
    files = (os.path.join(below, file) for below, _, names in os.walk(target) for file in names)
    images = (file for file in islice(files, MOST) if PurePosixPath(file).suffix.lower() in SUFFIXES)
    return [Skip(f"{where}/{os.path.relpath(file, target)}", ELSEWHERE, f"into {target}") for file in images]


def check_excluded(excluded: Counter[str], where: object) -> None:
    """Raise DataError for a pattern that matched nothing: it may be mistyped."""
    for pattern, count in excluded.items():
        if not count:
            hint = "give paths below the folder, such as 'sample/*' or '*.gif'"
            raise DataError(f"--exclude {pattern!r} matches no file", where=where, hint=hint)


def is_excluded(name: str, excluded: Counter[str]) -> bool:
    """Whether a pattern matches a path or a folder above it; counts what each pattern leaves out.

    A folder's path has "/" at its end.
    """
    plain = unicodedata.normalize("NFC", name)
    above = [f"{parent}/" for parent in PurePosixPath(plain).parents][:-1]
    for pattern in excluded:
        wanted = unicodedata.normalize("NFC", pattern).removeprefix("./")
        if any(fnmatchcase(p, wanted) or fnmatchcase(p.rstrip("/"), wanted.rstrip("/")) for p in (plain, *above)):
            excluded[pattern] += 1
            return True
    return False
