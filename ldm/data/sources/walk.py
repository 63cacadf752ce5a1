"""What lies in a folder: pictures, captions, metadata and shards, by their names. Nothing is opened."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ldm.console import progress
from ldm.data.sources.rows import METADATA
from ldm.data.sources.source import Skip
from ldm.errors import DataError
from ldm.images import SUFFIXES

CAPTION_SUFFIXES = (".txt", ".caption")  # beside the picture, the first that is there
FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".ppm", ".exr", ".cr2", ".nef", ".dng")
SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


@dataclass
class Found:
    """Paths relative to the root, with "/" between their parts, in one order on every machine."""

    root: Path  # resolved
    pictures: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)  # files with the suffix of a caption
    metadata: list[str] = field(default_factory=list)
    shards: dict[str, list[str]] = field(default_factory=lambda: {".tar": [], ".parquet": []})
    others: dict[str, str] = field(default_factory=dict)  # path -> suffix of every other file
    skipped: list[Skip] = field(default_factory=list)  # named as pictures, and none
    links: int = 0  # pictures that are links to others inside of the folder
    hidden: int = 0
    unfollowed: list[str] = field(default_factory=list)  # links to folders, and of files to what lies outside


def walk(folder: Path) -> Found:
    """All files below a folder. Links are followed to files inside of it alone; no other is ever opened.

    Raises DataError where it is no folder or cannot be listed.
    """
    if not folder.is_dir():
        raise DataError("is not a folder" if folder.exists() else "no such folder or file", where=folder)
    found = Found(Path(os.path.realpath(folder)))
    for entry, name in progress(_entries(found), desc="files", unit="file"):
        _sort(found, entry, name)
    return found


def _entries(found: Found) -> Iterator[tuple[os.DirEntry, str]]:
    """(entry, its path below the root) of every file, and of folders that are named as pictures."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(found.root / below) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"cannot be listed ({error.strerror})", where=found.root / below) from None
        folders = []
        for entry in listed:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith((".", "__MACOSX")):
                found.hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
                if _suffix(name) in SUFFIXES:
                    yield entry, name
            else:
                yield entry, name
        waiting += reversed(folders)


def _sort(found: Found, entry: os.DirEntry, name: str) -> None:
    suffix, where = _suffix(name), str(found.root / name)
    picture = suffix in SUFFIXES
    if fault := _fault(found, entry, name):
        if picture or suffix in FOREIGN:
            found.skipped.append(Skip(where.encode("utf-8", "replace").decode(), *fault))
        elif entry.is_symlink():
            found.unfollowed.append(name)
        else:
            found.others[name] = suffix
    elif picture:
        found.pictures.append(name)
        found.links += entry.is_symlink()
    elif suffix in FOREIGN:
        found.skipped.append(Skip(where, "is of a kind that is not read", suffix))
    elif entry.name in METADATA:
        found.metadata.append(name)
    elif PurePosixPath(name).suffix in CAPTION_SUFFIXES:
        found.captions.add(name)
    elif suffix in found.shards:
        found.shards[suffix].append(name)
    else:
        found.others[name] = suffix


def _fault(found: Found, entry: os.DirEntry, name: str) -> tuple[str, str] | None:
    """(reason, detail) why this is no plain file of this folder; links are looked through."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "has a name that is not UTF-8", ""
    if entry.is_symlink():
        try:
            target = os.path.realpath(entry.path)
            mode = os.stat(target).st_mode
        except OSError:
            return "is a link that leads nowhere", ""
        if stat.S_ISDIR(mode):
            return "is a link to a folder", ""
        if not target.startswith(str(found.root) + os.sep):
            return "is a link out of the folder", ""
    else:
        mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISREG(mode):
        return None
    return "is no file", "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def split_of(name: str) -> str | None:
    """train, validation or test, by the first folder of a path or the beginning of a shard's name; None for neither."""
    parts = PurePosixPath(name).parts
    if len(parts) > 1 and parts[0].lower() in SPLITS:
        return SPLITS[parts[0].lower()]
    if _suffix(name) in (".tar", ".parquet"):
        return SPLITS.get(re.split(r"[-_.]", parts[-1].lower())[0])
    return None


def wrong_suffixes(found: Found) -> Counter[str]:
    """How many pictures have beside them a file that seems to be meant as their caption, by what follows their stem."""
    beside: dict[tuple[str, str], list[str]] = {}
    for name in [*found.others, *found.captions]:
        path = PurePosixPath(name)
        stem = path.name.split(".")[0]
        beside.setdefault((str(path.parent), stem), []).append(path.name)
    seen: Counter[str] = Counter()
    for name in found.pictures:
        path = PurePosixPath(name)
        for other in beside.get((str(path.parent), path.name.split(".")[0]), ()):
            end = other.removeprefix(path.stem) if other.startswith(path.stem) else ""
            if end.startswith(".") and end not in CAPTION_SUFFIXES:
                seen[end] += 1
    return seen
