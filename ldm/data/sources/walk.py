"""The files of a folder sorted by their names: images, captions, metadata, shards. Nothing is opened."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ldm.console import progress
from ldm.data.images import ImageError
from ldm.data.sources.aside import behind, check_excluded, fault_of_link, homes_of, is_excluded
from ldm.data.sources.captions import CAPTION_SUFFIXES
from ldm.data.sources.rows import METADATA
from ldm.data.sources.source import Skip
from ldm.errors import DataError
from ldm.images import SUFFIXES

FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".svg", ".psd", ".ico", ".tga", ".ppm", ".exr", ".cr2", ".nef", ".dng")
FOREIGN += (".arw", ".cr3", ".raf", ".orf", ".rw2", ".pef", ".srw", ".nrw", ".3fr", ".iiq")  # cameras' own
FOREIGN += (".j2k", ".jpx", ".pgm", ".pnm", ".dds", ".hdr", ".avifs", ".heics", ".xcf", ".kra", ".clip", ".ai", ".eps")
SYSTEM = ("lost+found",)  # folders of the file system, which may be unreadable
PREPARED = "prepared.json"  # in the folder of a prepared dataset (ldm.data.cache.prepared)
MASK = "-mask.png"  # ends the name of the mask beside an image


@dataclass
class Listing:
    """Paths relative to the root, with "/" between their parts, in the same order on every machine."""

    root: Path  # resolved
    images: list[str] = field(default_factory=list)
    masks: dict[str, str] = field(default_factory=dict)  # image -> its mask, NAME-mask.png beside it
    captions: set[str] = field(default_factory=set)  # files with the suffix of a caption
    metadata: list[str] = field(default_factory=list)
    shards: dict[str, list[str]] = field(default_factory=lambda: {".tar": [], ".parquet": []})
    others: dict[str, str] = field(default_factory=dict)  # path -> suffix of every other file
    skipped: list[Skip] = field(default_factory=list)  # named like images, but none
    links: int = 0  # images that are links to other images in the folder
    hidden: int = 0
    unfollowed: list[str] = field(default_factory=list)  # links to folders, and links that lead out of the folder
    excluded: Counter[str] = field(default_factory=Counter)  # pattern -> files and folders that it leaves out

    @cached_property
    def homes(self) -> tuple[str, ...]:
        """Where links may lead: folders with "/" at the end."""
        return homes_of(self.root)


def walk(folder: Path, exclude: Sequence[str] = ()) -> Listing:
    """All files below a folder, without those that a pattern of `exclude` matches, or a folder above them.

    Only links to files inside the folder are followed, and those of a hub's snapshot into its own blobs. Raises
    DataError where it is no folder or cannot be listed, and for a pattern that matches nothing.
    """
    if not folder.is_dir():
        raise DataError("is not a folder" if folder.exists() else "no such folder or file", where=folder)
    root = Path(os.path.realpath(folder))
    listing = Listing(root, excluded=Counter(dict.fromkeys(exclude, 0)))
    for entry, name in progress(_entries(listing), desc="files", unit="file"):
        _sort(listing, entry, name)
    if exclude:
        check_excluded(listing.excluded, folder)
    listing.masks = _masks_of(listing.images, listing.captions)
    aside = set(listing.masks.values())
    listing.images = [name for name in listing.images if name not in aside]
    return listing


def _masks_of(names: list[str], captions: set[str]) -> dict[str, str]:
    """Image -> the file NAME-mask.png beside it, which is no image of its own; with a caption of its own it is one."""
    captioned = {name.rpartition(".")[0] for name in captions}
    found = [name for name in names if name.endswith(MASK) and name.rpartition(".")[0] not in captioned]
    by_stem = {name.rpartition(".")[0]: name for name in names if not name.endswith(MASK)} if found else {}
    return {by_stem[stem]: name for name in found if (stem := name.removesuffix(MASK)) in by_stem}


def _entries(listing: Listing) -> Iterator[tuple[os.DirEntry, str]]:
    """(entry, its path below the root) of every file, and of folders that are named like images."""
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(listing.root / below) as entries:
                listed = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            if PurePosixPath(below).name in SYSTEM:
                listing.hidden += 1
                continue
            hint = f"make it readable, or leave it out by --exclude '{below}'" if below else None
            what = f"cannot be listed ({error.strerror})"
            raise DataError(what, where=listing.root / below, hint=hint) from None
        folders = []
        for entry in listed:
            name = f"{below}/{entry.name}" if below else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if entry.name.startswith((".", "__MACOSX")):
                listing.hidden += 1
            elif listing.excluded and is_excluded(f"{name}/" if is_folder else name, listing.excluded):
                continue
            elif is_folder:
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
            listing.skipped += behind(entry.path, where, listing.homes)
        else:
            listing.others[name] = suffix
    elif image:
        listing.images.append(name)
        listing.links += entry.is_symlink() and os.path.realpath(entry.path).startswith(listing.homes[0])
    elif suffix in FOREIGN:
        listing.skipped.append(Skip(where, "is of a kind that is not read", suffix))
    elif entry.name in METADATA:
        listing.metadata.append(name)
    elif suffix in CAPTION_SUFFIXES:
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
        return fault_of_link(entry.path, listing.homes)
    mode = entry.stat(follow_symlinks=False).st_mode
    if stat.S_ISREG(mode):
        return None
    return "is no file", "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"


def open_file(path: Path) -> BinaryIO:
    """A regular file for reading; a pipe in its place does not block. Raises OSError, ImageError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ImageError("is no file", where=path)
    return os.fdopen(handle, "rb")


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote this folder."""
    single = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    return single or (folder / "dataset_dict.json").is_file()


def is_prepared(folder: str | Path | None) -> bool:
    """Whether `ldm data cache` wrote this folder."""
    return bool(folder) and Path(str(folder), PREPARED).is_file()
