"""The files of a folder sorted by their names: images, captions, metadata, shards. Nothing is opened."""

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

CAPTION_SUFFIXES = (".txt", ".caption")  # of the file beside an image; the first that exists is read
FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".ppm", ".exr", ".cr2", ".nef", ".dng")
SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


@dataclass
class Listing:
    """Paths relative to the root, with "/" between their parts, in the same order on every machine."""

    root: Path  # resolved
    images: list[str] = field(default_factory=list)
    captions: set[str] = field(default_factory=set)  # files with the suffix of a caption
    metadata: list[str] = field(default_factory=list)
    shards: dict[str, list[str]] = field(default_factory=lambda: {".tar": [], ".parquet": []})
    others: dict[str, str] = field(default_factory=dict)  # path -> suffix of every other file
    skipped: list[Skip] = field(default_factory=list)  # named like images, but none
    links: int = 0  # images that are links to other images in the folder
    hidden: int = 0
    unfollowed: list[str] = field(default_factory=list)  # links to folders, and links that lead out of the folder


def walk(folder: Path) -> Listing:
    """All files below a folder. Only links to files inside it are followed.

    Raises DataError where it is no folder or cannot be listed.
    """
    if not folder.is_dir():
        raise DataError("is not a folder" if folder.exists() else "no such folder or file", where=folder)
    listing = Listing(Path(os.path.realpath(folder)))
    for entry, name in progress(_entries(listing), desc="files", unit="file"):
        _sort(listing, entry, name)
    return listing


def _entries(listing: Listing) -> Iterator[tuple[os.DirEntry, str]]:
    """(entry, its path below the root) of every file, and of folders that are named like images."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(listing.root / below) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"cannot be listed ({error.strerror})", where=listing.root / below) from None
        folders = []
        for entry in listed:
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.name.startswith((".", "__MACOSX")):
                listing.hidden += 1
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
                if _suffix(name) in SUFFIXES:
                    yield entry, name
            else:
                yield entry, name
        waiting += reversed(folders)


def _sort(listing: Listing, entry: os.DirEntry, name: str) -> None:
    suffix, where = _suffix(name), str(listing.root / name)
    image = suffix in SUFFIXES
    if fault := _fault(listing, entry, name):
        if image or suffix in FOREIGN:
            listing.skipped.append(Skip(where.encode("utf-8", "replace").decode(), *fault))
        elif entry.is_symlink():
            listing.unfollowed.append(name)
        else:
            listing.others[name] = suffix
    elif image:
        listing.images.append(name)
        listing.links += entry.is_symlink()
    elif suffix in FOREIGN:
        listing.skipped.append(Skip(where, "is of a kind that is not read", suffix))
    elif entry.name in METADATA:
        listing.metadata.append(name)
    elif PurePosixPath(name).suffix in CAPTION_SUFFIXES:
        listing.captions.add(name)
    elif suffix in listing.shards:
        listing.shards[suffix].append(name)
    else:
        listing.others[name] = suffix


def _fault(listing: Listing, entry: os.DirEntry, name: str) -> tuple[str, str] | None:
    """(reason, detail) why this is no regular file of this folder, or None; links are followed."""
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
        if not target.startswith(str(listing.root) + os.sep):
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


def wrong_suffixes(listing: Listing) -> Counter[str]:
    """suffix -> number of images with a file beside them that was probably meant as their caption."""
    beside: dict[tuple[str, str], list[str]] = {}
    for name in [*listing.others, *listing.captions]:
        path = PurePosixPath(name)
        stem = path.name.split(".")[0]
        beside.setdefault((str(path.parent), stem), []).append(path.name)
    counted: Counter[str] = Counter()
    for name in listing.images:
        path = PurePosixPath(name)
        for name_beside in beside.get((str(path.parent), path.name.split(".")[0]), ()):
            end = name_beside.removeprefix(path.stem) if name_beside.startswith(path.stem) else ""
            if end.startswith(".") and end not in CAPTION_SUFFIXES:
                counted[end] += 1
    return counted


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    single = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()
