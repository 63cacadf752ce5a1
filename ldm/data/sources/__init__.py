"""One reader for every layout of captioned images: it detects the layout and counts what it finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ldm.config import require
from ldm.data.sources.folder import open_folder
from ldm.data.sources.library import is_hub_id, open_hub, open_saved
from ldm.data.sources.mixed import SHARDS, choose_shards, images_in
from ldm.data.sources.refusals import PACKED
from ldm.data.sources.sampled import SampledSource
from ldm.data.sources.source import Counts, Sample, Skip, Source, over_long
from ldm.data.sources.splits import choose_split, split_of
from ldm.data.sources.tables import open_parquet
from ldm.data.sources.tars import open_tars
from ldm.data.sources.walk import Listing, is_saved, walk
from ldm.errors import DataError, nearest

__all__ = [
    "Counts",
    "Sample",
    "SampledSource",
    "Skip",
    "Source",
    "is_hub_id",
    "open_source",
    "over_long",
]
CAPTIONS = ("auto", "names", "whole")
LAYOUTS = ("auto", "files", "kohya", "metadata", "tars", "parquet", "datasets")
Layout = Literal["auto", "files", "kohya", "metadata", "tars", "parquet", "datasets"]


def open_source(
    data: str | Path,
    captions: Literal["auto", "names", "whole"] = "auto",
    split: str | None = None,
    stream: bool = False,
    layout: Layout = "auto",
    exclude: Sequence[str] = (),
) -> Source:
    """The captioned images of a folder, a tar, a parquet file or a set on the hub (`owner/name[@revision]`).

    Folders: metadata.csv, .jsonl or .parquet; .txt, .caption or .json files beside the images (several lines of text
    are alternatives); kohya's `10_name` (repeats); tars (webdataset); parquet files with images; folders saved by
    `datasets`. `layout` chooses one where several are possible. With `captions="names"` the captions are made from the
    names of folders and files, with "whole" each caption file is one caption. Where the data has splits (folders or
    shards called train, test, …) one of them is read, "train" by default, or "all". Files that a pattern of `exclude`
    matches are left out. `stream` reads a hub set without downloading it. No image is decoded here, and nothing is ever
    written; `source.require()` checks whether the set is good enough for training.

    Raises DataError for missing files, damaged metadata, and paths that lead out of the folder; ConfigError.
    """
    require(captions in CAPTIONS, f"must be auto, names or whole, got {captions!r}", "captions")
    require(layout in LAYOUTS, f"unknown layout {layout!r}; {nearest(str(layout), LAYOUTS)}", "layout")
    require(not isinstance(exclude, str), f"expected a list of patterns, got {exclude!r}", "exclude")
    path = Path(data)
    if not path.exists():
        if isinstance(data, str) and is_hub_id(data):
            _check_layout(data, layout, ("datasets",), exclude)
            return open_hub(data, split, stream)
        raise DataError("no such folder or file", where=data)
    if path.is_file():
        kind = {".tar": "tars", ".parquet": "parquet"}.get(path.suffix.lower())
        if kind is None:
            packed = path.suffix.lower() in PACKED
            hint = "unpack it, and give the folder" if packed else "give a folder of images, a .tar or a .parquet"
            raise DataError("is a file", where=data, hint=hint)
        return _open_shards(path, path.parent.resolve(), [path.name], kind, layout, captions, exclude)
    if is_saved(path) and layout in ("auto", "datasets"):
        _check_layout(data, layout, ("datasets",), exclude)
        return open_saved(path, split)
    listing = walk(path, exclude)
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


def _check_layout(data: object, layout: str, possible: Sequence[str], exclude: Sequence[str] = ()) -> None:
    """Raise DataError for a layout that this data does not have, and for patterns where nothing has a name."""
    if layout not in ("auto", *possible):
        raise DataError(f"has no layout {layout!r}", where=data, hint=f"leave it out: it is {possible[0]}")
    if exclude:
        raise DataError("has rows, no files to leave out", where=data, hint="use --exclude for folders and tars")


def _open_shards(
    path: Path, root: Path, names: list[str], kind: str, layout: str, captions: str, exclude: Sequence[str]
) -> Source:
    if kind == "tars":
        _check_layout(path, layout, ("tars",))
        source = open_tars(path, root, names, captions == "whole", exclude)
        source.doubt = None if layout == "tars" else source.doubt
        return source
    _check_layout(path, layout, ("parquet",), exclude)
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
