"""One reader for every layout of captioned images: it detects the layout and counts what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.config import require
from ldm.data.sources.folder import open_folder
from ldm.data.sources.library import is_hub_id, open_hub, open_saved
from ldm.data.sources.sampled import SampledSource
from ldm.data.sources.source import Counts, Sample, Skip, Source, over_long
from ldm.data.sources.tables import open_parquet
from ldm.data.sources.tars import open_tars
from ldm.data.sources.walk import is_saved, split_of, walk
from ldm.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CaptionedFolder",
    "Counts",
    "Sample",
    "SampledSource",
    "Skip",
    "Source",
    "is_hub_id",
    "open_source",
    "over_long",
]


def open_source(
    data: str | Path, captions: Literal["auto", "names"] = "auto", split: str = "train", stream: bool = False
) -> Source:
    """The captioned images of a folder, a tar, a parquet file or a set on the hub (`owner/name[@revision]`).

    Folders: metadata.csv, .jsonl or .parquet; .txt or .caption files beside the images (several lines: alternatives);
    kohya's `10_name` (repeats); tars (webdataset); parquet files with images; folders saved by `datasets`. With
    `captions="names"` the captions are made from the names of folders and files. Where the data has splits (folders or
    shards called train, test, …) one of them is read. `stream` reads a hub set without downloading it. No image is
    decoded here, and nothing is ever written; `source.require()` checks whether the set is good enough for training.

    Raises DataError for missing files, damaged metadata, and paths that lead out of the folder; ConfigError.
    """
    require(captions in ("auto", "names"), f"must be auto or names, got {captions!r}", "captions")
    path = Path(data)
    if not path.exists():
        if isinstance(data, str) and is_hub_id(data):
            return open_hub(data, split, stream)
        raise DataError("no such folder or file", where=data)
    if path.is_file():
        reader = {".tar": open_tars, ".parquet": open_parquet}.get(path.suffix.lower())
        if reader is None:
            raise DataError("is a file", where=data, hint="give a folder of images, a .tar or a .parquet")
        return reader(path, path.parent.resolve(), [path.name])
    if is_saved(path):
        return open_saved(path, split)
    listing = walk(path)
    for suffix, reader in ((".tar", open_tars), (".parquet", open_parquet)):
        if listing.shards[suffix] and not listing.images and not listing.metadata:
            return reader(path, listing.root, _shards_of(path, listing.shards[suffix], split))
    return open_folder(path, listing, captions, split)


def _shards_of(path: Path, names: list[str], split: str) -> list[str]:
    splits = {name: split_of(name) for name in names}
    known = sorted(set(filter(None, splits.values())))
    if split in known:
        return [name for name in names if splits[name] == split]
    if known or split != "train":
        raise DataError(f"has no split {split!r}", where=path, hint=f"there is {', '.join(known) or 'none'}")
    return names


class CaptionedFolder:
    """Square images with their first captions: `folder[i] -> (uint8 (resolution, resolution, 3), caption)`.

    Images are scaled until the shorter side is `resolution` and cropped in the middle. Raises DataError with the first
    row or caption that cannot be used; images are read only when they are indexed.
    """

    def __init__(self, path: str | Path, resolution: int = 128):
        self.source, self.resolution = open_source(path), resolution
        self.source.require(max_bad=0)
        self.captions = [sample.captions[0] for sample in self.source]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        import numpy as np
        from PIL import Image, ImageOps

        image = self.source[index].image(at_least=self.resolution)
        square = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        return np.array(square), self.captions[index]
