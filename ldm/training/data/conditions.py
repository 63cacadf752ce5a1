"""What ControlNets see of images: made of what is trained on itself, or read from a folder of images of equal names.

Shapes:  C 3, or 1 where the channels are equal   H, W image size
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.console import progress
from ldm.control import ALIASES, GREY, KINDS, condition_of
from ldm.data.buckets import Size
from ldm.data.images import MAX_FILE, read_header, read_image
from ldm.data.transforms import TransformConfig, View, fixed_views, pixels
from ldm.errors import ConfigError, DataError, nearest
from ldm.training.data.encoded import Memory
from ldm.training.data.images import ImageSet

SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class ControlFolder:
    """Files of conditions, by the id of the image that each belongs to."""

    folder: Path
    files: Mapping[str, Path]

    def read(self, id: str, view: View, digest: str) -> Tensor:
        """The view of a condition as uint8 (3, H, W). Raises DataError where it is gone or was changed."""
        path = self.files[id]
        content = _content(path)
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError("was changed since the training began", where=path)
        image = read_image(io.BytesIO(content), str(path), background=(0, 0, 0))  # conditions are light on black
        original = view.original
        if image.size != (original.width, original.height):
            image = image.resize((original.width, original.height), Image.Resampling.LANCZOS)
        return pixels(image, view)


def control_kind(control: str) -> str | None:
    """The kind of `ldm.control` that a setting means; None: a folder of conditions. Raises ConfigError."""
    name = ALIASES.get(control, control)
    if name in KINDS:
        return name
    if Path(os.path.expanduser(control)).is_dir():
        return None
    hint = f"{nearest(control, [*KINDS, *ALIASES])}; a folder has a condition of the same name for each image"
    raise ConfigError(f"{control!r:.80} is neither a kind of control nor a folder", where="control", hint=hint)


def with_conditions(images: ImageSet, control: str) -> ImageSet:
    """`images`, whose batches have conditions: of the kind `control`, or from that folder.

    In the folder each image has a file of its name (sub/a.png that of sub/a.jpg) and its proportions. Raises DataError,
    which names the images that have none.
    """
    images.control = kind = control_kind(control)
    if kind is not None:
        return images
    folder = Path(os.path.expanduser(control))
    whole, data = folder.resolve(), Path(images.data.folder).resolve()
    if data == whole or (whole.is_relative_to(data) and any((data / i.id).is_relative_to(whole) for i in images.items)):
        what = f"lies in {images.data.folder}, and its files are trained on as images"
        hint = "put the conditions beside it, or leave them out: --exclude 'NAME/*'"
        raise ConfigError(what, where=f"control: {folder}", hint=hint)
    files = _files(folder, [item.id for item in images.items])
    digests = {}
    for item in progress(images.items, desc="conditions", unit="image"):
        content, path = _content(files[item.id]), files[item.id]
        header = read_header(io.BytesIO(content), str(path))
        if abs(header.width * item.size.height - header.height * item.size.width) >= item.size.height + item.size.width:
            size = f"{header.width}x{header.height}, and {item.id} is {item.size.width}x{item.size.height}"
            raise DataError(f"is {size}: a condition has the proportions of its image", where=path)
        digests[item.id] = hashlib.sha256(content).hexdigest()
    images.control = ControlFolder(folder, files)
    images.items = [replace(item, control=digests[item.id]) for item in images.items]
    return images


def _files(folder: Path, ids: Sequence[str]) -> dict[str, Path]:
    found = {}
    for id in ids:
        name = folder / id
        tried = [name, *(name.with_suffix(suffix) for suffix in SUFFIXES)]
        if (path := next((path for path in tried if path.is_file()), None)) is not None:
            found[id] = path
    if missing := [id for id in ids if id not in found]:
        what = f"has no condition of {len(missing)} of {len(ids)} images ({', '.join(missing[:3])})"
        raise DataError(what, where=folder, hint="a condition has the name of its image: sub/a.png that of sub/a.jpg")
    return found


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=path) from None


class Conditions:
    """The conditions of a set's views, in memory as far as it reaches; `memory` is None where no view comes again."""

    def __init__(self, images: ImageSet, memory: Memory | None):
        self.images, self.memory = images, memory

    def of(self, place: int, view: View) -> Tensor:
        """uint8 (C, H, W). Raises DataError where a file is gone or changed."""
        if self.memory is None:
            return self._make(place, view)
        key = (self.images.items[place].pixels, "control", view)
        return self.memory.get(key, lambda: (self._make(place, view),))[0]

    def _make(self, place: int, view: View) -> Tensor:
        item, control = self.images.items[place], self.images.control
        if isinstance(control, ControlFolder):
            return control.read(item.id, view, item.control)
        assert control is not None
        image, digest = self.images.read(place)
        if digest != item.digest:
            raise DataError("was changed since the training began", where=f"{self.images.source.path}/{item.id}")
        return condition_pixels(control, pixels(image, view))


def condition_pixels(kind: str, image: Tensor) -> Tensor:
    """uint8 (3, H, W) -> its condition of a kind, uint8 (C, H, W)."""
    made = condition_of(kind, Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())))
    values = torch.from_numpy(np.asarray(made).transpose(2, 0, 1).copy())
    return values[:1].clone() if kind in GREY else values


def square_view(size: Size, side: int) -> View:
    """An image of this size, cropped in the middle to a square."""
    return fixed_views(size, Size(side, side), TransformConfig())[0]
