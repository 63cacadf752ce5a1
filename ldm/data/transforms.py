"""The transforms of an image and its captions in an epoch: resize, crop, flip, and the choice of a caption.

Every choice is a function of (seed, epoch, sample), so that nothing has to be saved to resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ldm import images
from ldm.config import require
from ldm.data.buckets import Size, resized
from ldm.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class TransformConfig:
    """How an image fills its bucket. Raises ConfigError."""

    crop: Literal["center", "random"] = "center"
    flip: float = 0.0  # probability of a mirrored image

    def __post_init__(self):
        require(self.crop in ("center", "random"), f"must be center or random, got {self.crop!r}", "crop")
        require(0 <= self.flip <= 1, f"must be 0 to 1, got {self.flip}", "flip")


@dataclass(frozen=True)
class View:
    """The transform of one image: resized, mirrored if `flipped`, then cropped."""

    original: Size  # of the upright image
    resized: Size
    top: int  # of the crop, in the resized and mirrored image
    left: int
    size: Size  # of the crop: the bucket
    flipped: bool = False

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """XL's size and crop conditioning (Podell et al. 2023, 2.2): original size, crop's top left, target size."""
        return (*self.original, self.top, self.left, *self.size)


def draw(*parts: object) -> float:
    """A random number in [0, 1), seeded by `parts`: the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def draw_view(original: Size, bucket: Size, config: TransformConfig, seed: int, epoch: int, sample: int) -> View:
    """The view of a sample in an epoch. Crop and flip are drawn independently."""
    full = resized(original, bucket)
    room = full.height - bucket.height, full.width - bucket.width
    if config.crop == "random":
        top, left = (
            int(draw(seed, "crop", axis, epoch, sample) * (space + 1)) for axis, space in zip(("top", "left"), room)
        )
    else:
        top, left = (round(space / 2) for space in room)
    flipped = draw(seed, "flip", epoch, sample) < config.flip
    return View(original, full, top, room[1] - left if flipped else left, bucket, flipped)


def fixed_views(original: Size, bucket: Size, config: TransformConfig) -> tuple[View, ...]:
    """Every view that `draw_view` can return, for the cache: one, or two with flips.

    Raises ConfigError for random crops, whose number is not limited.
    """
    if config.crop != "center":
        raise ConfigError("random crops cannot be cached", where="crop", hint="use crop=center, or no cache")
    chances = [0.0] * (config.flip < 1) + [1.0] * (config.flip > 0)
    return tuple(draw_view(original, bucket, TransformConfig(flip=chance), 0, 0, 0) for chance in chances)


def pixels(image: Image.Image, view: View) -> torch.Tensor:
    """The view of an upright image as uint8 (3, H, W), by an antialiased Lanczos filter.

    The image may have been decoded at reduced size. Only the cropped part is resized: an image of 1x5000 needs no more
    memory than any other. Raises DataError where the view was made for another shape.
    """
    import numpy
    import torch
    from PIL import Image

    height, width = view.original
    larger = image.height > height or image.width > width
    if larger or abs(image.width * height - image.height * width) >= height + width:  # sides rounded to a pixel
        was = f"{view.original.width}x{view.original.height}"
        raise DataError(f"is {image.width}x{image.height} now, it was {was}", hint="read the dataset again")
    left = view.resized.width - view.size.width - view.left if view.flipped else view.left
    across, down = image.width / view.resized.width, image.height / view.resized.height
    right, bottom = (left + view.size.width) * across, (view.top + view.size.height) * down
    box = (left * across, view.top * down, min(right, image.width), min(bottom, image.height))
    size = (view.size.width, view.size.height)
    part = images.flatten(image).resize(size, Image.Resampling.LANCZOS, box=box)
    if view.flipped:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # not by torch, which would start more threads beside each thread that reads images
    return torch.from_numpy(numpy.ascontiguousarray(numpy.asarray(part).transpose(2, 0, 1)))


def to_float(batch: torch.Tensor) -> torch.Tensor:
    """uint8 (…, 3, H, W) -> fp32 in [-1, 1]."""
    return batch.float().div_(127.5).sub_(1)


def choose_caption(captions: Sequence[str], dropout: float, seed: int, epoch: int, sample: object) -> str:
    """One of the captions, all equally likely; the empty text if there is none, or with probability `dropout`."""
    if not captions or draw(seed, "caption dropout", epoch, sample) < dropout:
        return ""
    return captions[int(draw(seed, "caption", epoch, sample) * len(captions))]


def shuffle_tags(caption: str, keep: int, seed: int, epoch: int, sample: int) -> str:
    """The parts between commas in random order, except the first `keep`, which stay in place."""
    tags = [tag.strip() for tag in caption.split(",")]
    order = sorted(range(keep, len(tags)), key=lambda i: draw(seed, "tags", i, epoch, sample))
    return ", ".join([*tags[:keep], *(tags[i] for i in order)])
