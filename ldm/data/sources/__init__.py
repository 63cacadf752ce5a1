"""One reader for every layout of captioned images: it detects the layout and counts what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ldm.config import require
from ldm.data.sources.folder import open_folder
from ldm.data.sources.library import is_hub_id, open_hub, open_saved
from ldm.data.sources.mixed import SHARDS, check_layout, open_mixed, open_shard
from ldm.data.sources.sampled import SampledSource
from ldm.data.sources.source import Counts, Sample, Skip, Source, over_long
from ldm.data.sources.walk import is_saved, walk
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
            check_layout(data, layout, ("datasets",), exclude)
            return open_hub(data, split, stream)
        raise DataError("no such folder or file", where=data)
    if path.is_file():
        return open_shard(data, captions, layout, exclude)
    if is_saved(path) and layout in ("auto", "datasets"):
        check_layout(data, layout, ("datasets",), exclude)
        return open_saved(path, split)
    listing = walk(path, exclude)
    if layout in SHARDS or any(listing.shards.values()):
        return open_mixed(path, listing, captions, split, layout)
    return open_folder(path, listing, captions, split, layout)
