"""Captioned pictures in a folder of the user's: `metadata.jsonl` or `metadata.csv` beside the images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import images
from ldm.errors import DataError, nearest

if TYPE_CHECKING:
    import numpy as np

METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = ("text", "caption", "prompt")  # columns, the first that is there
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 64_000_000  # refused from the header, before anything is decoded
TODO = 'write one line an image: {"file_name": "cat.png", "text": "a cat"}'


class CaptionedFolder:
    """Images with captions: `len(folder)`, `folder[i] -> (uint8 (resolution, resolution, 3), caption)`.

    Images are turned upright, laid on white where transparent, scaled until the shorter side is `resolution` and
    cropped in the middle. All rows are checked at once, pixels when they are asked for. Raises DataError naming the
    file and line for damaged rows, empty captions, missing images and paths that lead out of the folder.
    """

    def __init__(self, path: str | Path, resolution: int = 128):
        self.path, self.resolution = Path(path), resolution
        self.metadata = find_metadata(self.path)
        self.files: list[Path] = []
        self.captions: list[str] = []
        root = self.path.resolve()
        for where, row in read_rows(self.metadata):
            self.files.append(_image_path(root, row, where))
            self.captions.append(_caption(row, where))
        if not self.files:
            raise DataError("holds no captions", where=self.metadata, todo=TODO)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return load_image(self.files[index], self.resolution), self.captions[index]


def find_metadata(folder: Path) -> Path:
    """The one metadata file of a folder. Raises DataError where there is none, or both."""
    if not folder.is_dir():
        raise DataError("is not a folder" if folder.exists() else "no such folder", where=folder)
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError("both metadata.jsonl and metadata.csv are there", where=folder, todo="keep one of them")
    if not found:
        near = [p.name for p in folder.iterdir() if p.name.lower().startswith("metadata")]
        seen = f" ({near[0]} is there: {nearest(near[0], METADATA)})" if near else ""
        raise DataError(f"has no metadata.jsonl and no metadata.csv{seen}", where=folder, todo=TODO)
    return found[0]


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) for each row of a metadata file; blank lines are skipped. Raises DataError with the line."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"is not UTF-8 (byte {error.start})", where=f"{path}:{line}", todo="save it as UTF-8") from None
    yield from (_csv_rows if path.suffix == ".csv" else _jsonl_rows)(path, text)


def _jsonl_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON ({error})", where=where) from None
        if not isinstance(row, dict):
            raise DataError(f"expected an object, got {type(row).__name__}", where=where, todo=TODO)
        yield where, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    f"expected {len(reader.fieldnames)} columns", where=where, todo="quote texts with commas"
                )
            yield where, row
    except csv.Error as error:
        raise DataError(f"is not CSV ({error})", where=f"{path}:{reader.line_num}") from None


def _image_path(root: Path, row: dict[str, Any], where: str) -> Path:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        what = "has no file_name" if name in (None, "") else f"file_name is not text: {name!r}"
        raise DataError(what, where=where, todo=TODO)
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"file_name leads out of the folder: {name!r}", where=where)
    path = root / name
    if not path.resolve().is_relative_to(root):
        raise DataError(f"file_name is a link out of the folder: {name!r}", where=where)
    if not path.is_file():
        raise DataError(f"no such image: {name!r}", where=where)
    return path


def _caption(row: dict[str, Any], where: str) -> str:
    column = next((c for c in CAPTIONS if c in row), None)
    if column is None:
        listed = ", ".join(map(repr, row))
        raise DataError(f"has no caption: the columns are {listed}", where=where, todo="name it 'text'")
    text = row[column]
    if not isinstance(text, str):
        raise DataError(f"{column} is not text: {text!r}", where=where)
    if not text.strip():
        raise DataError(f"{column} is empty", where=where, todo="write a caption, or remove the row")
    return text.strip()


def load_image(path: Path, resolution: int) -> np.ndarray:
    """One picture as uint8 (resolution, resolution, 3). Raises DataError naming a file that cannot be read."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{image.width}x{image.height} is over {MAX_PIXELS // 10**6} megapixels", where=path)
            if image.mode == "RGB":
                image.draft("RGB", (2 * resolution, 2 * resolution))  # large JPEGs decode at a fraction of their size
            picture = images.flatten(ImageOps.exif_transpose(image))
        return np.array(ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot be read as a picture ({error})", where=path) from None
