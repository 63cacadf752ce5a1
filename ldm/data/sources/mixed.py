"""Tars and parquet files of images: one of them, or a folder that holds some, perhaps beside image files."""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ldm.data.sources.folder import open_folder
from ldm.data.sources.refusals import PACKED
from ldm.data.sources.source import Source
from ldm.data.sources.splits import LEAST, choose_split, split_of
from ldm.data.sources.tables import count_images, open_parquet
from ldm.data.sources.tars import open_tars
from ldm.data.sources.walk import Listing
from ldm.errors import DataError
from ldm.images import SUFFIXES

SHARDS = {"tars": ".tar", "parquet": ".parquet"}  # layout -> suffix of its files
FOLDERS = ("files", "kohya", "metadata")  # layouts of image files


def open_shard(data: str | Path, captions: str, layout: str, exclude: Sequence[str]) -> Source:
    """The source of one tar or parquet file."""
    path = Path(data)
    kind = {suffix: kind for kind, suffix in SHARDS.items()}.get(path.suffix.lower())
    if kind is None:
        packed = path.suffix.lower() in PACKED
        hint = "unpack it, and give the folder" if packed else "give a folder of images, a .tar or a .parquet"
        raise DataError("is a file", where=data, hint=hint)
    return _open_shards(path, path.parent.resolve(), [path.name], kind, layout, captions, exclude)


def open_mixed(path: Path, listing: Listing, captions: str, split: str | None, layout: str) -> Source:
    """The source of a folder with tars or parquet files, or of the image files beside them."""
    kind, note, doubt = choose_shards(path, listing, layout)
    if kind == "images":
        source: Source = open_folder(path, listing, captions, split, layout)
    else:
        names, choice_note, choice_doubt = _of_split(path, listing, kind, split)
        source = _open_shards(path, listing.root, names, kind, layout, captions, ())
        source.counts.notes += [choice_note] if choice_note else []
        source.doubt = choice_doubt or source.doubt
    source.counts.notes += [note] if note else []
    source.doubt = doubt or source.doubt
    return source


def check_layout(data: object, layout: str, possible: Sequence[str], exclude: Sequence[str] = ()) -> None:
    """Raise DataError for a layout that this data does not have, and for patterns where nothing has a name."""
    if layout not in ("auto", *possible):
        raise DataError(f"has no layout {layout!r}", where=data, hint=f"leave it out: it is {possible[0]}")
    if exclude:
        raise DataError("has rows, no files to leave out", where=data, hint="use --exclude for folders and tars")


def _open_shards(
    path: Path, root: Path, names: list[str], kind: str, layout: str, captions: str, exclude: Sequence[str]
) -> Source:
    if kind == "tars":
        check_layout(path, layout, ("tars",))
        source = open_tars(path, root, names, captions == "whole", exclude)
        source.doubt = None if layout == "tars" else source.doubt
        return source
    check_layout(path, layout, ("parquet",), exclude)
    return open_parquet(path, root, names)


def _of_split(path: Path, listing: Listing, kind: str, split: str | None) -> tuple[list[str], str, DataError | None]:
    """The shards of the split that is read, a note and a doubt about that."""
    names = listing.shards[SHARDS[kind]]
    sizes: Counter[str | None] = Counter()
    if any(map(split_of, names)):
        for name, count in images_in(listing, kind).items():
            sizes[split_of(name)] += count
    choice = choose_split(sizes, split, path)
    kept = [name for name in names if choice.split in (None, split_of(name))]
    note = choice.note
    if len(kept) < len(names):
        note = f"{len(names) - len(kept)} of {len(names)} files belong to other splits"
    return kept, note, choice.doubt


def choose_shards(path: Path, listing: Listing, layout: str) -> tuple[str, str, DataError | None]:
    """("images", "tars" or "parquet", a note on what is left, a doubt where that is more than a little)."""
    if layout in SHARDS:
        if not listing.shards[SHARDS[layout]]:
            raise DataError(f"holds no {SHARDS[layout]}", where=path, hint="leave the layout out")
        return layout, "", None
    shards = [kind for kind, suffix in SHARDS.items() if listing.shards[suffix]]
    files = len(listing.images) + len(listing.skipped)
    if layout in FOLDERS or not shards:
        return "images", "", None
    counts = {kind: sum(images_in(listing, kind).values()) for kind in shards} | ({"images": files} if files else {})
    total, best = sum(counts.values()), max(counts, key=lambda kind: counts[kind])
    if len(counts) == 1 or not total:
        return ("images" if listing.metadata else shards[0]) if not total else best, "", None
    others = ", ".join(f"{count} in {_named(kind)}" for kind, count in counts.items() if kind != best and count)
    if counts[best] >= LEAST * total:
        return best, f"images that are not read: {others}" if others else "", None
    ways = [
        f"--layout {'files' if kind == 'images' else kind} uses {n} of {total} images" for kind, n in counts.items()
    ]
    what = f"holds {counts[best]} images in {_named(best)}, and {others}"
    return best, "", DataError(what, where=path, hint=f"choose: {', '.join(ways)}")


def _named(kind: str) -> str:
    return "files" if kind == "images" else f"{SHARDS[kind]} files"


def images_in(listing: Listing, kind: str) -> dict[str, int]:
    """The images in each tar or parquet file; none in a damaged one."""
    count = count_images if kind == "parquet" else _in_tar
    return {name: count(listing.root / name) for name in listing.shards[SHARDS[kind]]}


def _in_tar(path: Path) -> int:
    count = 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []
                count += member.isreg() and os.path.splitext(member.name)[1].lower() in SUFFIXES
    except (OSError, tarfile.TarError, ValueError):
        return count
    return count
