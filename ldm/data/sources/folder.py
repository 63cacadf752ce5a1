"""Image files in a folder, with captions from metadata, from files beside them, from kohya's folders or from names."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ldm.console import progress
from ldm.data.images import ImageError
from ldm.data.sources.metadata import by_metadata
from ldm.data.sources.names import captions_from_names
from ldm.data.sources.rows import HINT, METADATA, near_miss
from ldm.data.sources.source import Counts, Sample, Source, captions_of
from ldm.data.sources.walk import CAPTION_SUFFIXES, Listing, split_of, wrong_suffixes
from ldm.errors import DataError
from ldm.images import SUFFIXES

MAX_CAPTIONS = 1 << 20  # bytes of a caption file
REPEATS = re.compile(r"([1-9]\d{0,5})_(.*\S)")  # kohya: 10_name


class FolderSource(Source):
    """Files in a folder; `rows` are (path below the root, captions, repeats)."""

    def __init__(self, path: Path, root: Path, layout: str, counts: Counts, rows: list[tuple[str, tuple, int]]):
        super().__init__(path, layout, counts, len(rows))
        self.root, self.rows = root, rows

    def _sample(self, position: int) -> Sample:
        name, captions, repeats = self.rows[position]
        path = self.root / name
        return Sample(name, captions, repeats, str(path), partial(open_file, path))


def open_file(path: Path) -> BinaryIO:
    """A regular file for reading; a pipe in its place does not block. Raises OSError, ImageError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ImageError("is no file", where=path)
    return os.fdopen(handle, "rb")


def open_folder(path: Path, listing: Listing, captions: str, split: str) -> FolderSource:
    """The source of a folder of image files. Raises DataError for metadata that is damaged or leads out of it."""
    counts = Counts(found=len(listing.images) + len(listing.skipped))
    names = _of_split(listing, split, counts)
    _add_notes(listing, counts)
    if captions == "names":
        counts.skipped += listing.skipped
        layout, rows = "captions from folder and file names", _by_name(names, listing, counts)
    elif listing.metadata:
        layout, rows = by_metadata(names, listing, counts)
    else:
        counts.skipped += listing.skipped
        layout, rows = _by_files(names, listing, counts)
    source = FolderSource(path, listing.root, layout, counts, rows)
    if not counts.captions:
        source.no_captions = _no_captions(path, listing, captions, counts)
    return source


def _of_split(listing: Listing, split: str, counts: Counts) -> list[str]:
    """The images of one split; all images where the folder has no splits."""
    splits = [split_of(name) for name in listing.images]
    known = sorted(set(filter(None, splits)))
    if split not in known:
        if known or split != "train":
            raise DataError(
                f"has no split {split!r}", where=listing.root, hint=f"there is {', '.join(known) or 'none'}"
            )
        return listing.images
    names = []
    for name, its_split in zip(listing.images, splits, strict=True):
        if its_split == split:
            names.append(name)
        else:
            counts.leave(name, f"in the split {its_split}" if its_split else "in no split")
    return names


def _add_notes(listing: Listing, counts: Counts) -> None:
    if listing.links:
        counts.notes.append(f"{listing.links} images are links to others in the folder")
    if listing.unfollowed:
        what = f"{len(listing.unfollowed)} links to folders or out of the folder are not followed"
        counts.notes.append(f"{what}: {_few(listing.unfollowed)}")
    if listing.hidden:
        counts.notes.append(f"{listing.hidden} hidden files and folders are ignored")
    kinds = Counter(suffix or "no suffix" for suffix in listing.others.values())
    kinds.update({suffix: len(names) for suffix, names in listing.shards.items() if names})
    if kinds:
        listed = ", ".join(
            f"{count} {kind}" for kind, count in sorted(kinds.most_common(10), key=lambda k: (-k[1], k[0]))
        )
        counts.notes.append(f"{kinds.total()} other files are ignored: {listed}")


def _few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _by_name(names: list[str], listing: Listing, counts: Counts) -> list[tuple[str, tuple, int]]:
    if listing.metadata or listing.captions:
        files = len(listing.metadata) + len(listing.captions)
        counts.notes.append(f"{files} files with captions are ignored: captions come from names, as requested")
    rows = [(name, texts, 1) for name, texts in zip(names, captions_from_names(names), strict=True)]
    for name, texts, _ in rows:
        counts.use(name, texts, has_caption=False)
    return rows


# Captions in files beside the images.


def _by_files(names: list[str], listing: Listing, counts: Counts) -> tuple[str, list[tuple[str, tuple, int]]]:
    classes = _kohya_classes(names)
    rows, used, both, kinds, from_classes = [], set(), [], Counter(), 0
    for name in progress(names, desc="captions", unit="file"):
        stem = name.removesuffix(PurePosixPath(name).suffix)
        beside = [stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in listing.captions]
        used.update(beside)
        repeats, title = classes.get(name, (1, ""))
        texts: tuple[str, ...] = ()
        if beside:
            texts, fault, detail = _read_captions(listing.root / beside[0])
            if fault:
                counts.skip(listing.root / beside[0], fault, detail)
                continue
            kinds[PurePosixPath(beside[0]).suffix] += 1
            both += [name] if len(beside) > 1 else []
        elif title:
            texts, from_classes = (title,), from_classes + 1
        counts.use(name, texts, has_caption=bool(beside))
        rows.append((name, texts, repeats))
    if both:
        counts.notes.append(f"{len(both)} images have a .txt and a .caption: the .txt is read ({_few(both)})")
    if orphans := listing.captions - used:
        counts.notes.append(f"{len(orphans)} caption files belong to no image: {_few(orphans)}")
    if from_classes:
        counts.notes.append(f"{from_classes} captions are the names of kohya's folders")
    read = " and ".join(f"{kind} files" for kind, _ in kinds.most_common())
    layout = f"images with captions in {read}" if read else "images without captions"
    if classes:
        repeats = ", ".join(map(str, sorted({times for times, _ in classes.values()})))
        layout = f"kohya's folders, repeats {repeats}, captions in {read or 'their names'}"
    return layout, rows


def _kohya_classes(names: list[str]) -> dict[str, tuple[int, str]]:
    """Image -> (repeats, name) where every image lies in a folder `10_name`; otherwise {}.

    The folders stand at the top, or in the folder of a split.
    """
    classes = {}
    for name in names:
        parts = PurePosixPath(name).parts[:-1]
        parts = parts[1:] if parts and split_of(name) else parts
        match = REPEATS.fullmatch(parts[0]) if parts else None
        if match is None:
            return {}
        classes[name] = int(match[1]), match[2].strip()
    return classes


def _read_captions(path: Path) -> tuple[tuple[str, ...], str, str]:
    """(captions, fault, detail) of a caption file: one on each line that is not blank."""
    try:
        with open_file(path) as file:
            data = file.read(MAX_CAPTIONS + 1)
    except (OSError, ImageError) as error:
        return (), "caption cannot be read", getattr(error, "strerror", None) or str(error)
    if len(data) > MAX_CAPTIONS:
        return (), "caption is longer than a megabyte", ""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return (), "caption is not UTF-8", "UTF-16"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return (), "caption is not UTF-8", f"byte {error.start}"
    texts, fault = captions_of(re.split(r"\r\n|\r|\n", text))
    return texts, fault, f"byte {data.index(0)}" if b"\0" in data else ""


# Captions in metadata.


def _no_captions(path: Path, listing: Listing, captions: str, counts: Counts) -> DataError | None:
    """The error for a folder without any caption: it names what was found instead."""
    if captions == "names":
        return DataError(
            "no name of a file or folder holds words", where=path, hint="write captions in cat.txt beside cat.png"
        )
    if listing.metadata:
        if counts.skipped:  # their reasons say more
            return None
        return DataError("holds no captions", where=listing.root / listing.metadata[0], hint=HINT)
    if not listing.images:
        suffixes = ", ".join(sorted({suffix or "no suffix" for suffix in listing.others.values()})[:8]) or "nothing"
        return DataError(f"holds no images ({suffixes})", where=path, hint=f"they end in {' '.join(SUFFIXES)}")
    hint = near_miss([PurePosixPath(name).name for name in listing.others])
    if hint:
        return DataError(f"has no captions{hint}", where=path, hint=f"captions are read from {', '.join(METADATA)}")
    if wrong := wrong_suffixes(listing):
        suffix, count = wrong.most_common(1)[0]
        what = f"has no captions: {count} images have a file *{suffix} beside them, which is not read"
        return DataError(what, where=path, hint="rename these files to *.txt")
    if listing.captions:
        what = f"has no captions: none of {len(listing.captions)} caption files ({_few(listing.captions)}) has the name"
        return DataError(f"{what} of an image", where=path, hint="name the caption of cat.png cat.txt")
    what = f"has no captions: {len(listing.images)} images, no metadata and no .txt or .caption beside them"
    return DataError(what, where=path, hint="write cat.txt beside cat.png, or take the names with --captions names")
