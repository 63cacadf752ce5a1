"""Which layout a folder has that holds several: image files, tars, parquet files."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from ldm.data.sources.splits import LEAST
from ldm.data.sources.tables import count_images
from ldm.data.sources.walk import Listing
from ldm.errors import DataError
from ldm.images import SUFFIXES

SHARDS = {"tars": ".tar", "parquet": ".parquet"}  # layout -> suffix of its files
FOLDERS = ("files", "kohya", "metadata")  # layouts of image files


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
