"""webdataset: tars of images with captions of the same key, as img2dataset writes them: 0001.jpg, 0001.txt, …"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ldm.console import progress
from ldm.data.images import MAX_FILE, ImageError
from ldm.data.sources.folder import MAX_CAPTIONS
from ldm.data.sources.source import Counts, Sample, Source, caption_column, captions_of
from ldm.errors import DataError
from ldm.images import SUFFIXES

TEXTS = (".txt", ".caption", ".json")  # of one key; the first that holds a caption is used
BLOCK = 512  # bytes of a tar's header


class TarSource(Source):
    """Images inside tars, read where they lie; only seven numbers of each are kept in memory."""

    def __init__(self, path: Path, root: Path, layout: str, counts: Counts, tars: list[str], index: array):
        super().__init__(path, layout, counts, len(index) // len(FIELDS))
        self.root, self.tars, self.index = root, tars, index

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
            texts = _captions(file, text, length, TEXTS[kind])[0] if length else ()
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


def open_tars(path: Path, root: Path, tars: list[str]) -> TarSource:
    """The source of these tars below `root`. Raises DataError for a file that is no uncompressed tar."""
    counts, index = Counts(), array("q")
    for number, name in enumerate(progress(tars, desc="tars", unit="tar")):
        try:
            with tarfile.open(root / name, "r:") as tar, (root / name).open("rb") as file:
                for members in _by_key(tar):
                    _take(f"{root}/{name}", name, number, members, file, counts, index)
        except (OSError, tarfile.TarError, ValueError) as error:
            what, hint = f"is not a sound tar ({error})", "write it again, uncompressed"
            raise DataError(what, where=root / name, hint=hint) from None
    layout = "webdataset: one tar" if len(tars) == 1 else f"webdataset: {len(tars)} tars"
    source = TarSource(path, root, layout, counts, tars, index)
    what = "holds no captions: no .txt and no .json with a caption has the key of an image"
    source.no_captions = DataError(what, where=path, hint="write 0001.txt after 0001.jpg")
    return source


def _by_key(tar: tarfile.TarFile) -> Iterator[list[tarfile.TarInfo]]:
    """Lists of consecutive members with the same key: their path up to the first dot of the name."""
    key, members = None, []
    while (member := tar.next()) is not None:
        tar.members = []  # which would grow with each member
        folder, _, name = member.name.rpartition("/")
        if not member.isreg() or name.startswith("."):
            continue
        member_key = (folder, name.partition(".")[0])
        if member_key != key and members:
            yield members
            members = []
        key = member_key
        members.append(member)
    if members:
        yield members


def _take(
    path: str, shard: str, tar: int, members: list[tarfile.TarInfo], file: BinaryIO, counts: Counts, index: array
) -> None:
    """Count and index the image of one key."""
    size = os.fstat(file.fileno()).st_size
    kinds = [os.path.splitext(member.name)[1].lower() for member in members]
    images = [member for member, kind in zip(members, kinds, strict=True) if kind in SUFFIXES]
    counts.found += len(images)
    for extra in images[1:]:
        counts.leave(f"{path}/{extra.name}", "beside another image of its key")
    if not images:
        return
    image, texts, has_caption, chosen = images[0], (), False, (0, 0, 0)
    for kind, suffix in enumerate(TEXTS):
        if suffix not in kinds or texts:
            continue
        member = members[kinds.index(suffix)]
        texts, fault = _captions(file, member.offset_data, member.size, suffix)
        if fault:
            counts.skip(f"{path}/{member.name}", fault)
            return
        has_caption = has_caption or suffix != ".json"
        chosen = (member.offset_data, member.size, kind)
    where = f"{path}/{image.name}"
    if image.offset_data + image.size > size:
        counts.skip(where, "is damaged or cut short", "the tar ends before it")
    elif image.size > MAX_FILE:
        counts.skip(where, "file is too large", f"{image.size / 1e6:.0f} MB")
    else:
        counts.use(f"{shard}/{image.name}", texts, has_caption)
        index.extend((tar, image.offset, image.offset_data, image.size, *chosen[:2], chosen[2]))


def _captions(file: BinaryIO, begin: int, size: int, suffix: str) -> tuple[tuple[str, ...], str]:
    """(captions, fault) of a text member: the lines of a .txt or .caption, or the caption of a .json."""
    if size > MAX_CAPTIONS:
        return (), "caption is longer than a megabyte"
    file.seek(begin)
    try:
        text = file.read(size).decode("utf-8-sig")
    except UnicodeDecodeError:
        return (), "caption is not UTF-8"
    if suffix != ".json":
        return captions_of(text.splitlines() if suffix == ".caption" else text.replace("\r\n", "\n").split("\n"))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return (), "its .json is not JSON"
    column = caption_column(list(values)) if isinstance(values, dict) else None
    return captions_of(values[column]) if column else ((), "")
