"""Pictures as files in a folder: with metadata, with caption files beside them, in kohya's folders, or by names."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ldm.console import progress
from ldm.data.images import PictureError
from ldm.data.sources.names import captions_from_names
from ldm.data.sources.rows import METADATA, TODO, near_miss, read_rows
from ldm.data.sources.source import Counts, Sample, Source, caption_column, captions_of
from ldm.data.sources.walk import CAPTION_SUFFIXES, Found, split_of, wrong_suffixes
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
    """A plain file for reading; a pipe that has taken its place does not block. Raises OSError, PictureError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise PictureError("is no file", where=path)
    return os.fdopen(handle, "rb")


def open_folder(path: Path, found: Found, captions: str, split: str) -> FolderSource:
    """The source of a folder of picture files. Raises DataError for metadata that is damaged or leads out of it."""
    counts = Counts(found=len(found.pictures) + len(found.skipped))
    names = _of_split(found, split, counts)
    _remarks(found, counts)
    if captions == "names":
        counts.skipped += found.skipped
        layout, rows = "captions from folder and file names", _by_name(names, found, counts)
    elif found.metadata:
        layout, rows = _by_metadata(names, found, counts)
    else:
        counts.skipped += found.skipped
        layout, rows = _by_files(names, found, counts)
    source = FolderSource(path, found.root, layout, counts, rows)
    if not counts.captions:
        source.no_captions = _no_captions(path, found, captions, counts)
    return source


def _of_split(found: Found, split: str, counts: Counts) -> list[str]:
    """The pictures of one split: all of them where the folder has no such division."""
    splits = [split_of(name) for name in found.pictures]
    there = sorted(set(filter(None, splits)))
    if split not in there:
        if there or split != "train":
            raise DataError(f"has no split {split!r}", where=found.root, todo=f"there is {', '.join(there) or 'none'}")
        return found.pictures
    kept = []
    for name, own in zip(found.pictures, splits, strict=True):
        if own == split:
            kept.append(name)
        else:
            counts.leave(name, f"in the split {own}" if own else "in no split")
    return kept


def _remarks(found: Found, counts: Counts) -> None:
    if found.links:
        counts.notes.append(f"{found.links} pictures are links to others in the folder")
    if found.unfollowed:
        what = f"{len(found.unfollowed)} links to folders or out of the folder are not followed"
        counts.notes.append(f"{what}: {_few(found.unfollowed)}")
    if found.hidden:
        counts.notes.append(f"{found.hidden} hidden files and folders are ignored")
    kinds = Counter(suffix or "no suffix" for suffix in found.others.values())
    kinds.update({suffix: len(names) for suffix, names in found.shards.items() if names})
    if kinds:
        listed = ", ".join(
            f"{count} {kind}" for kind, count in sorted(kinds.most_common(10), key=lambda k: (-k[1], k[0]))
        )
        counts.notes.append(f"{kinds.total()} other files are ignored: {listed}")


def _few(names) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _by_name(names: list[str], found: Found, counts: Counts) -> list[tuple[str, tuple, int]]:
    if found.metadata or found.captions:
        files = len(found.metadata) + len(found.captions)
        counts.notes.append(f"{files} files with captions are ignored: captions come from names, as asked")
    rows = [(name, texts, 1) for name, texts in zip(names, captions_from_names(names), strict=True)]
    for name, texts, _ in rows:
        counts.use(name, texts, there=False)
    return rows


# Captions in files beside the pictures.


def _by_files(names: list[str], found: Found, counts: Counts) -> tuple[str, list[tuple[str, tuple, int]]]:
    classes = _kohya_classes(names)
    rows, used, both, kinds, from_classes = [], set(), [], Counter(), 0
    for name in progress(names, desc="captions", unit="file"):
        stem = name.removesuffix(PurePosixPath(name).suffix)
        beside = [stem + suffix for suffix in CAPTION_SUFFIXES if stem + suffix in found.captions]
        used.update(beside)
        repeats, title = classes.get(name, (1, ""))
        texts: tuple[str, ...] = ()
        if beside:
            texts, fault, detail = _read_captions(found.root / beside[0])
            if fault:
                counts.skip(found.root / beside[0], fault, detail)
                continue
            kinds[PurePosixPath(beside[0]).suffix] += 1
            both += [name] if len(beside) > 1 else []
        elif title:
            texts, from_classes = (title,), from_classes + 1
        counts.use(name, texts, there=bool(beside))
        rows.append((name, texts, repeats))
    if both:
        counts.notes.append(f"{len(both)} pictures have a .txt and a .caption: the .txt is read ({_few(both)})")
    if orphans := found.captions - used:
        counts.notes.append(f"{len(orphans)} caption files belong to no picture: {_few(orphans)}")
    if from_classes:
        counts.notes.append(f"{from_classes} captions are the names of kohya's folders")
    read = " and ".join(f"{kind} files" for kind, _ in kinds.most_common())
    layout = f"pictures with captions in {read}" if read else "pictures without captions"
    if classes:
        repeats = ", ".join(map(str, sorted({times for times, _ in classes.values()})))
        layout = f"kohya's folders, repeats {repeats}, captions in {read or 'their names'}"
    return layout, rows


def _kohya_classes(names: list[str]) -> dict[str, tuple[int, str]]:
    """Picture -> (repeats, name) where every picture lies in a folder `10_name`; otherwise {}.

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
    except (OSError, PictureError) as error:
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


def _by_metadata(names: list[str], found: Found, counts: Counts) -> tuple[str, list[tuple[str, tuple, int]]]:
    taken = set(names)
    elsewhere = set(found.pictures) - taken
    known = {unicodedata.normalize("NFC", name): name for name in taken | elsewhere | set(found.others)}
    bad = {os.path.relpath(skip.where, found.root): skip for skip in found.skipped}
    of: dict[str, list] = {}  # picture -> [captions, whether a row has a caption field, fault or None]
    columns, again = Counter(), 0
    for where, below, row in _rows(found):
        name, fault = _picture_of(row, below, found.root, where)
        name = known.get(unicodedata.normalize("NFC", name), name)
        if fault is None and name not in taken and name not in elsewhere and name not in bad:
            counts.found += 1
            if name in found.others:
                taken.add(name)
            else:
                fault = ("no such image", repr(name))
        elif fault is not None:
            counts.found += 1
        if fault is not None:
            counts.skip(where, *fault)
            continue
        if name in bad and bad[name] is not None:
            counts.skipped.append(bad[name])
            bad[name] = None
        if name not in taken:
            continue
        texts, column, fault = _caption_of(row)
        columns[column] += column is not None
        again += name in of
        entry = of.setdefault(name, [(), False, None])
        entry[0] += tuple(text for text in texts if text not in entry[0])
        entry[1] |= column is not None
        entry[2] = entry[2] or (fault and (where, *fault))
    rows = _used(of, counts)
    for name in [*names, *(name for name, skip in bad.items() if skip is not None)]:
        if name not in of:
            counts.leave(name, "without a row in the metadata")
    stems = {name.removesuffix(PurePosixPath(name).suffix) for name in of}
    if both := [file for file in found.captions if file.removesuffix(PurePosixPath(file).suffix) in stems]:
        counts.notes.append(f"{len(both)} caption files beside pictures with a row are ignored: the row counts")
    if again:
        counts.notes.append(f"{again} rows name a picture again: their captions are alternatives")
    del columns[None]
    files = found.metadata[0] if len(found.metadata) == 1 else f"{len(found.metadata)} metadata files"
    return f"imagefolder: {files}, captions in {' and '.join(map(repr, columns)) or 'no column'}", rows


def _used(of: dict[str, list], counts: Counts) -> list[tuple[str, tuple, int]]:
    rows = []
    for name, (texts, there, fault) in of.items():
        if fault:
            counts.skip(*fault)
            continue
        counts.use(name, texts, there)
        rows.append((name, texts, 1))
    return rows


def _rows(found: Found):
    """(where, folder of the metadata, row) of every row of every metadata file."""
    folders = Counter(str(PurePosixPath(name).parent) for name in found.metadata)
    for folder, count in folders.items():
        if count > 1:
            here = " and ".join(PurePosixPath(n).name for n in found.metadata if str(PurePosixPath(n).parent) == folder)
            where = found.root if folder == "." else found.root / folder
            raise DataError(f"both {here} are there", where=where, todo="keep one of them")
    for name in found.metadata:
        below = PurePosixPath(name).parent
        for where, row in read_rows(found.root / name):
            yield where, below, row


def _picture_of(row: dict[str, Any], below: PurePosixPath, root: Path, where: str) -> tuple[str, tuple | None]:
    """(path below the root, fault or None). Raises DataError for a path that leads out of the folder."""
    named = [key for key in row if key == "file_name" or key.endswith("_file_name")]
    column = min(named, key=lambda key: (key != "file_name", key != "image_file_name", named.index(key)), default=None)
    name = row.get(column)
    if name is None or name == "":
        return "", ("has no file_name", "")
    if not isinstance(name, str):
        return "", ("file_name is not text", repr(name)[:100])
    outside = "\0" in name or name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:[\\/]", name)
    if outside or ".." in re.split(r"[\\/]", name):
        raise DataError(f"file_name leads out of the folder: {name!r}", where=where)
    relative = str(below / name)
    path = root / relative
    if path.is_symlink() or any((root / parent).is_symlink() for parent in PurePosixPath(relative).parents):
        real = os.path.realpath(path)
        if not real.startswith(str(root) + os.sep):
            raise DataError(f"file_name is a link out of the folder: {name!r}", where=where)
    return relative, None


def _caption_of(row: dict[str, Any]) -> tuple[tuple[str, ...], str | None, tuple | None]:
    """(captions, their column, fault or None) of a row; without such a column no captions, and no fault."""
    column = caption_column(list(row))
    if column is None:
        return (), None, ("has no caption", f"the columns are {', '.join(map(repr, row))}")
    texts, fault = captions_of(row[column])
    return texts, column, (fault, f"{column}: {row[column]!r:.100}") if fault else None


def _no_captions(path: Path, found: Found, captions: str, counts: Counts) -> DataError | None:
    """What to say of a folder without one caption: what was found in their place."""
    if captions == "names":
        return DataError("no name says anything", where=path, todo="write captions in cat.txt beside cat.png")
    if found.metadata:
        if counts.skipped:  # their reasons say more
            return None
        return DataError("holds no captions", where=found.root / found.metadata[0], todo=TODO)
    if not found.pictures:
        seen = ", ".join(sorted({suffix or "no suffix" for suffix in found.others.values()})[:8]) or "nothing"
        return DataError(f"holds no pictures ({seen})", where=path, todo=f"they end in {' '.join(SUFFIXES)}")
    near = near_miss([PurePosixPath(name).name for name in found.others])
    if near:
        return DataError(f"has no captions{near}", where=path, todo=f"captions are read from {', '.join(METADATA)}")
    if wrong := wrong_suffixes(found):
        suffix, count = wrong.most_common(1)[0]
        what = f"has no captions: {count} pictures have a file *{suffix} beside them, which is not read"
        return DataError(what, where=path, todo="rename these files to *.txt")
    if found.captions:
        what = f"has no captions: none of {len(found.captions)} caption files ({_few(found.captions)}) has the name"
        return DataError(f"{what} of a picture", where=path, todo="name the caption of cat.png cat.txt")
    what = f"has no captions: {len(found.pictures)} pictures, no metadata and no .txt or .caption beside them"
    return DataError(what, where=path, todo="write cat.txt beside cat.png, or take the names with --captions names")
