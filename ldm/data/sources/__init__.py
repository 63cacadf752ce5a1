"""One reader for every layout of captioned pictures: it tells which one it is by looking, and says what it found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.config import require
from ldm.data.sources.first import FirstSource
from ldm.data.sources.folder import open_folder
from ldm.data.sources.library import is_hub_id, is_saved, open_hub, open_saved
from ldm.data.sources.source import Counts, Sample, Skip, Source, over_long
from ldm.data.sources.tables import open_parquet
from ldm.data.sources.tars import open_tars
from ldm.data.sources.walk import split_of, walk
from ldm.errors import DataError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CaptionedFolder",
    "Counts",
    "FirstSource",
    "Sample",
    "Skip",
    "Source",
    "is_hub_id",
    "open_source",
    "over_long",
]


def open_source(
    data: str | Path, captions: Literal["auto", "names"] = "auto", split: str = "train", stream: bool = False
) -> Source:
    """The captioned pictures of a folder, a tar, a parquet file or a set on the hub (`owner/name[@revision]`).

    Folders: metadata.csv, .jsonl or .parquet; .txt or .caption files beside the pictures (several lines: alternatives);
    kohya's `10_name` (repeats); tars (webdataset); parquet files with pictures; what `datasets` saved. With
    `captions="names"` the captions are made from the names of folders and files. Of data with splits (folders or shards
    called train, test, …) one is read. `stream` reads a hub set as it comes instead of downloading it. Nothing is
    decoded yet and nothing ever written; `source.require()` says whether it is good enough to learn from.

    Raises DataError for what is not there, damaged metadata, and paths that lead out of the folder; ConfigError.
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
            raise DataError("is a file", where=data, todo="give a folder of pictures, a .tar or a .parquet")
        return reader(path, path.parent.resolve(), [path.name])
    if is_saved(path):
        return open_saved(path, split)
    found = walk(path)
    for suffix, reader in ((".tar", open_tars), (".parquet", open_parquet)):
        if found.shards[suffix] and not found.pictures and not found.metadata:
            return reader(path, found.root, _shards_of(path, found.shards[suffix], split))
    return open_folder(path, found, captions, split)


def _shards_of(path: Path, names: list[str], split: str) -> list[str]:
    splits = {name: split_of(name) for name in names}
    there = sorted(set(filter(None, splits.values())))
    if split in there:
        return [name for name in names if splits[name] == split]
    if there or split != "train":
        raise DataError(f"has no split {split!r}", where=path, todo=f"there is {', '.join(there) or 'none'}")
    return names


class CaptionedFolder:
    """Square pictures with their first captions: `folder[i] -> (uint8 (resolution, resolution, 3), caption)`.

    Pictures are scaled until the shorter side is `resolution` and cropped in the middle. Raises DataError naming the
    first of any rows or captions that cannot be used; pixels are looked at when they are asked for.
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

        picture = self.source[index].picture(at_least=self.resolution)
        square = ImageOps.fit(picture, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        return np.array(square), self.captions[index]
