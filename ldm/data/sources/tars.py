"""webdataset: tars of images with captions of the same key, as img2dataset writes them: 0001.jpg, 0001.txt, …"""

from __future__ import annotations

import contextlib
import io
import os
import tarfile
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from ldm.console import progress
from ldm.data.images import MAX_FILE, ImageError
from ldm.data.sources.aside import check_excluded, is_excluded
from ldm.data.sources.captions import CAPTION_SUFFIXES, MAX_CAPTIONS, Captions, parse_captions
from ldm.data.sources.kohya import read_kohya
from ldm.data.sources.lost import BESIDE
from ldm.data.sources.source import Counts, Sample, Source
from ldm.errors import DataError
from ldm.files import format_bytes
from ldm.images import SUFFIXES


class TarSource(Source):
    """Images inside tars, read where they lie; only seven numbers of each are kept in memory."""

    def __init__(
        self, path: Path, root: Path, layout: str, counts: Counts, tars: list[str], index: array, whole: bool = False
    ):
        super().__init__(path, layout, counts, len(index) // len(FIELDS))
        self.root, self.tars, self.index, self.whole = root, tars, index, whole

    def _sample(self, position: int) -> Sample:
        width = len(FIELDS)
        tar, head, begin, size, text, length, kind = self.index[width * position : width * (position + 1)]
        path = self.root / self.tars[tar]
        texts: tuple[str, ...] = ()
        name = f"byte {head}"
        gone = contextlib.suppress(OSError, tarfile.TarError)  # opening the image will report it
        with gone, path.open("rb") as file:
            file.seek(head)
            with tarfile.open(fileobj=file, mode="r:") as opened:  # its names of any length and kind
                member = opened.next()
                name = member.name if member else name
            texts = _captions(file, text, length, CAPTION_SUFFIXES[kind], self.whole).texts if length else ()
        where = f"{self.tars[tar]}/{name}"
        return Sample(
            where, texts, 1, f"{self.root}/{where}", partial(_piece, path, begin, size, f"{self.root}/{where}")
        )


FIELDS = ("tar", "header", "image", "bytes", "caption", "bytes", "kind")


def _piece(path: Path, begin: int, size: int, where: str) -> BinaryIO:
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(size)
    if len(data) < size:
        raise ImageError("is damaged or cut short", "the tar ends before it", where=where)
    return io.BytesIO(data)


class _Member(NamedTuple):
    """A file in a tar."""

    name: str
    header: int  # byte
    begin: int
    size: int

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()

    @property
    def stem(self) -> str:
        return unicodedata.normalize("NFC", os.path.splitext(self.name)[0])


def open_tars(path: Path, root: Path, tars: list[str], whole: bool = False, exclude: Sequence[str] = ()) -> TarSource:
    """The source of these tars below `root`; the files of a key may lie anywhere in its tar.

    Raises DataError for a file that is no uncompressed tar, and a pattern of `exclude` that matches no member.
    """
    counts, index, alone = Counts(), array("q"), []
    excluded = Counter(dict.fromkeys(exclude, 0))
    for number, name in enumerate(progress(tars, desc="tars", unit="tar")):
        try:
            keys = _by_key(root / name, excluded)
            with (root / name).open("rb") as file:
                for members in keys:
                    alone += _take(f"{root}/{name}", name, number, members, file, counts, index, whole)
        except (OSError, tarfile.TarError, ValueError) as error:
            what, hint = f"is not a sound tar ({error})", "write it again, uncompressed"
            raise DataError(what, where=root / name, hint=hint) from None
    check_excluded(excluded, path)
    layout = "webdataset: one tar" if len(tars) == 1 else f"webdataset: {len(tars)} tars"
    source = TarSource(path, root, layout, counts, tars, index, whole)
    source.no_captions = _no_captions(path, counts, alone)
    if alone:
        counts.notes.append(f"{len(alone)} caption files have the key of no image of their tar: {_few(alone)}")
    source.doubt = _doubt_repeats(path, source)
    return source


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _no_captions(path: Path, counts: Counts, alone: list[str]) -> DataError:
    if not counts.found:
        return DataError("holds no images", where=path, hint=f"they end in {' '.join(SUFFIXES)}")
    found = f", {len(alone)} caption files have other keys: {_few(alone)}" if alone else ""
    what = "holds no captions: no .txt and no .json with a caption has the key of an image"
    return DataError(f"{what} ({counts.found} images{found})", where=path, hint="put 0001.txt into the tar of 0001.jpg")


def _doubt_repeats(path: Path, source: TarSource) -> DataError | None:
    """The doubt about a tar of kohya's folders, whose repeats a tar does not have."""
    if not len(source):
        return None
    first, last = (PurePosixPath(source[i].id.partition(".tar/")[2]) for i in (0, -1))
    if first.parts[0] == last.parts[0]:  # the folder that was packed
        first, last = (name.relative_to(name.parts[0]) for name in (first, last))
    first, last = str(first), str(last)
    if len(found := read_kohya([first, last]).classes) < 2 or {times for times, _ in found.values()} == {1}:
        return None
    what = f"holds kohya's folders ({first.split('/')[0]}, …), whose repeats are not read from a tar"
    return DataError(what, where=path, hint="unpack it and give the folder, or use --layout tars")


def _by_key(path: Path, excluded: Counter[str]) -> Iterator[list[_Member]]:
    """The members of each key, in the order of their first: their path up to the first dot of the name."""
    keys: dict[tuple[str, str], list[_Member]] = {}
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # which would grow with each member
            folder, _, name = member.name.rpartition("/")
            plain = member.name.removeprefix("./")
            left_out = is_excluded(plain, excluded) or is_excluded(f"{path.name}/{plain}", excluded)
            if not member.isreg() or name.startswith(".") or left_out:
                continue
            key = unicodedata.normalize("NFC", folder), unicodedata.normalize("NFC", name.partition(".")[0])
            found = _Member(member.name, member.offset, member.offset_data, member.size)
            keys.setdefault(key, []).append(found)
    for members in keys.values():
        yield from _apart(members)


def _apart(members: list[_Member]) -> list[list[_Member]]:
    """The members of a key; those of a.1.png and a.2.png by themselves, if each image has a text of its full name."""
    images = [member.stem for member in members if member.suffix in SUFFIXES]
    texts = {member.stem for member in members if member.suffix in CAPTION_SUFFIXES}
    if len(images) < 2 or not set(images) <= texts or len(set(images)) < len(images):
        return [members]
    return [[member for member in members if member.stem == stem] for stem in images]


def _take(
    path: str,
    shard: str,
    tar: int,
    members: list[_Member],
    file: BinaryIO,
    counts: Counts,
    index: array,
    whole: bool,
) -> list[str]:
    """Count and index the image of one key; returns the names of caption files without an image."""
    size = os.fstat(file.fileno()).st_size
    images = [member for member in members if member.suffix in SUFFIXES]
    counts.found += len(images)
    for extra in images[1:]:
        counts.leave(f"{shard}/{extra.name}", BESIDE)
    if not images:
        return [member.name for member in members if member.suffix in CAPTION_SUFFIXES[:2]]
    image, read, chosen = images[0], Captions(found=False), (0, 0, 0)
    for kind, suffix in enumerate(CAPTION_SUFFIXES):
        member = next((member for member in members if member.suffix == suffix), None)
        if member is None or read.texts:
            continue
        has_caption = read.found
        read = _captions(file, member.begin, member.size, suffix, whole)
        if read.fault:
            counts.skip(f"{path}/{member.name}", read.fault, read.detail)
            return []
        read = read._replace(found=has_caption or read.found)
        chosen = (member.begin, member.size, kind)
    where = f"{path}/{image.name}"
    if image.begin + image.size > size:
        counts.skip(where, "is damaged or cut short", "the tar ends before it")
    elif image.size > MAX_FILE:
        counts.skip(where, "file is too large", format_bytes(image.size))
    else:
        counts.use(f"{shard}/{image.name}", read.texts, read.found)
        index.extend((tar, image.header, image.begin, image.size, *chosen))
    return []


def _captions(file: BinaryIO, begin: int, size: int, suffix: str, whole: bool) -> Captions:
    """What a member of a tar says."""
    file.seek(begin)
    return parse_captions(file.read(min(size, MAX_CAPTIONS + 1)), suffix, whole)
