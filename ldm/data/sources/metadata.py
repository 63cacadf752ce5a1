"""The images of a folder by its metadata.csv, .jsonl or .parquet."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ldm.data.sources.aside import is_excluded
from ldm.data.sources.lost import NO_IMAGE, NO_NAME, NO_ROW
from ldm.data.sources.rows import caption_column, read_rows, rivals
from ldm.data.sources.source import Counts, captions_of
from ldm.data.sources.splits import LEAST
from ldm.data.sources.walk import Listing
from ldm.errors import DataError


def by_metadata(names: list[str], listing: Listing, counts: Counts) -> tuple[str, list[tuple[str, tuple, int]]]:
    wanted = set(names)
    elsewhere = set(listing.images) - wanted
    masks = {mask: image for image, mask in listing.masks.items()}
    known = _Names(wanted | elsewhere | set(listing.others) | set(masks))
    bad = {os.path.relpath(skip.where, listing.root): skip for skip in listing.skipped}
    of: dict[str, list] = {}  # image -> [captions, whether a row has a caption field, fault or None]
    columns, seen, repeated = Counter(), {}, 0
    left_out = Counter(listing.excluded)  # a copy: rows are no files
    for where, below, row in _rows(listing):
        seen |= dict.fromkeys(row)
        name, fault = _image_of(row, below, listing.root, listing.homes, where)
        name = known.find(name)
        if fault is None and is_excluded(name, left_out):
            continue
        if fault is None and name not in wanted and name not in elsewhere and name not in bad:
            counts.found += 1
            if name in listing.others:
                wanted.add(name)
            elif name in masks:  # with a row of its own it is an image
                wanted.add(name)
                del listing.masks[masks.pop(name)]
            else:
                fault = (NO_IMAGE, f"{name!r}{known.nearest(name)}")
        elif fault is not None:
            counts.found += 1
        if fault is not None:
            counts.skip(where, *fault)
            continue
        if name in bad and bad[name] is not None:
            counts.skipped.append(bad[name])
            bad[name] = None
        if name not in wanted:
            continue
        texts, column, fault = _caption_of(row)
        columns[column] += column is not None
        repeated += name in of
        entry = of.setdefault(name, [(), False, None])
        entry[0] += tuple(text for text in texts if text not in entry[0])
        entry[1] |= column is not None
        entry[2] = entry[2] or (fault and (where, *fault))
    counts.notes += rivals(list(seen))
    rows = _used(of, counts)
    for name in [*names, *(name for name, skip in bad.items() if skip is not None)]:
        if name not in of:
            counts.leave(name, NO_ROW)
    stems = {name.removesuffix(PurePosixPath(name).suffix) for name in of}
    texts = (file for file in listing.captions if not file.lower().endswith(".json"))
    if both := [file for file in texts if file.removesuffix(PurePosixPath(file).suffix) in stems]:
        counts.notes.append(f"{len(both)} caption files beside images with a row are ignored: the row counts")
    if known.mended:
        counts.notes.append(f"{known.mended} rows name their image in other capital letters: that is taken")
    if repeated:
        counts.notes.append(f"{repeated} rows name an image again: their captions are alternatives")
    del columns[None]
    files = listing.metadata[0] if len(listing.metadata) == 1 else f"{len(listing.metadata)} metadata files"
    return f"imagefolder: {files}, captions in {' and '.join(map(repr, columns)) or 'no column'}", rows


def doubt_rows(
    path: Path, names: list[str], listing: Listing, counts: Counts, layout: str, captioned: Callable[[], int]
) -> DataError | None:
    """The doubt about metadata that names few of the images; `captioned` tells how many have a caption file."""
    without = counts.aside[NO_ROW]
    if layout == "metadata":
        counts.chosen.add(NO_ROW)
    if layout == "metadata" or not counts.used or without <= (1 - LEAST) * (len(names) + len(listing.skipped)):
        return None
    used = len(names) - without
    what = f"{listing.metadata[0]} has rows for {used} of {len(names)} images"
    if counts.skipped:
        what += f", and {len(counts.skipped)} rows cannot be used: {counts.skipped[0]}"
    ways = f"--layout metadata uses these {used}, --layout files all {len(names)}"
    ways += f", {captioned()} of them with a caption file"
    return DataError(what, where=path, hint=ways)


class _Names:
    """The files that rows may name, in any Unicode form, and in other capital letters where only one is meant."""

    def __init__(self, names: set[str]):
        self.names = {unicodedata.normalize("NFC", name): name for name in names}
        folded = Counter(name.casefold() for name in self.names)
        self.folded = {name.casefold(): file for name, file in self.names.items() if folded[name.casefold()] == 1}
        self.stems = {PurePosixPath(name).stem.casefold(): file for name, file in self.names.items()}
        self.mended = 0

    def find(self, name: str) -> str:
        """The file that is meant; the name itself where there is none."""
        plain = unicodedata.normalize("NFC", name)
        if plain in self.names:
            return self.names[plain]
        found = self.folded.get(plain.casefold())
        self.mended += found is not None
        return found or name

    def nearest(self, name: str) -> str:
        """Words about a file of this name in another folder or with another suffix; "" where there is none."""
        found = self.stems.get(PurePosixPath(unicodedata.normalize("NFC", name)).stem.casefold())
        return f", but {found!r} is there" if found else ""


def _used(of: dict[str, list], counts: Counts) -> list[tuple[str, tuple, int]]:
    rows = []
    for name, (texts, has_caption, fault) in of.items():
        if fault:
            counts.skip(*fault)
            continue
        counts.use(name, texts, has_caption)
        rows.append((name, texts, 1))
    return rows


def _rows(listing: Listing):
    """(where, folder of the metadata, row) of every row of every metadata file."""
    folders = Counter(str(PurePosixPath(name).parent) for name in listing.metadata)
    for folder, count in folders.items():
        if count > 1:
            here = " and ".join(
                PurePosixPath(n).name for n in listing.metadata if str(PurePosixPath(n).parent) == folder
            )
            where = listing.root if folder == "." else listing.root / folder
            raise DataError(f"both {here} are there", where=where, hint="keep one of them")
    for name in listing.metadata:
        below = PurePosixPath(name).parent
        for where, row in read_rows(listing.root / name):
            yield where, below, row


def _image_of(
    row: dict[str, Any], below: PurePosixPath, root: Path, homes: tuple[str, ...], where: str
) -> tuple[str, tuple | None]:
    """(path below the root, fault or None) of a row. Raises DataError for a path that leads out of the folder."""
    named = [key for key in row if key == "file_name" or key.endswith("_file_name")]
    column = min(named, key=lambda key: (key != "file_name", key != "image_file_name", named.index(key)), default=None)
    name = row.get(column)
    if name is None or name == "":
        return "", (NO_NAME, "" if column else f"the columns are {', '.join(map(repr, row))}")
    if not isinstance(name, str):
        return "", ("file_name is not text", repr(name)[:100])
    outside = "\0" in name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name)
    if outside or ".." in re.split(r"[\\/]", name):
        raise DataError(f"file_name leads out of the folder: {name!r}", where=where)
    relative = str(below / name)
    if "\\" in name and not (root / relative).exists():  # written on Windows
        relative = str(below / name.replace("\\", "/"))
    path = root / relative
    linked = path.is_symlink() or any((root / parent).is_symlink() for parent in PurePosixPath(relative).parents)
    if linked and not os.path.realpath(path).startswith(homes):
        raise DataError(f"file_name is a link out of the folder: {name!r}", where=where)
    return relative, None


def _caption_of(row: dict[str, Any]) -> tuple[tuple[str, ...], str | None, tuple | None]:
    """(captions, their column, fault or None) of a row; column None where it has no caption column."""
    column = caption_column(list(row))
    if column is None:
        return (), None, ("has no caption", f"the columns are {', '.join(map(repr, row))}")
    texts, fault = captions_of(row[column])
    return texts, column, (fault, f"{column}: {row[column]!r:.100}") if fault else None
