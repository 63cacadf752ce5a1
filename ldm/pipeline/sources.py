"""The initial images: read, checked, brought to size, and made larger at their sides (outpainting).

A mask is white where the image is painted anew and black where it stays; greys count from 50 % up as white. Where its
transparency varies, that is its shape: a stroke on a transparent layer is painted, and so is a hole in the image. Sizes
that the model cannot have are brought to the next smaller one, the image by Lanczos, its mask with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from PIL import Image, ImageOps

from ldm import console
from ldm.colours import MARKS, colour_profile
from ldm.config import require
from ldm.data.images import read_image
from ldm.errors import ConfigError, DataError, nearest
from ldm.file_names import spelt_alike
from ldm.images import READABLE, flatten
from ldm.pipeline.checks import check_int, check_size
from ldm.pipeline.keywords import MAX_SIZE

SAME = 8  # mean difference in 0 to 255 below which colours are the same ones, saved again
WHITE, BLACK, HALF = (255, 255, 255), (0, 0, 0), 128
DIGESTS = {"image": "image_sha256", "mask_image": "mask_sha256"}  # a keyword -> the metadata's, of the pixels
MAX_AREA = 16  # times the pixels that the model was trained on: more only where a size is given
SIDES = ("left", "right", "top", "bottom")


@dataclass(frozen=True)
class Source:
    """What one image is drawn from."""

    image: Image.Image  # RGB
    mask: Image.Image | None = None  # L, of the same size: 255 where it is painted anew, 0 where it stays
    metadata: Mapping[str, Any] = field(default_factory=dict)  # where it is from, and the pixels' sha256


@dataclass(frozen=True)
class Sources:
    """Those of a call, one for each image, and how far they grow at their sides."""

    each: tuple[Source, ...]
    outpaint: Mapping[str, int] | None = None  # side -> pixels

    @property
    def sides(self) -> Mapping[str, int]:
        return self.outpaint or {}

    @property
    def masked(self) -> bool:
        return self.outpaint is not None or self.each[0].mask is not None

    def size(self, factor: int, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """(height, width) that is drawn: the given ones, or the images' brought down to multiples of `factor`.

        Raises ConfigError where the images are of several sizes or too small, or the sides leave no room for them.
        """
        sides = {side: check_size(pixels, f"outpaint {side}", factor) for side, pixels in self.sides.items() if pixels}
        across, down = (sum(sides.get(side, 0) for side in pair) for pair in (SIDES[:2], SIDES[2:]))
        sizes = {source.image.size for source in self.each}
        if len(sizes) > 1 and None in (height, width):
            listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
            raise ConfigError(f"the images are of several sizes ({listed})", where="image", hint="give width, height")
        own = [side // factor * factor for side in sizes.pop()]
        require(min(own) > 0, f"an image of less than {factor} pixels a side cannot be drawn from", "image")
        width, height = width or own[0] + across, height or own[1] + down
        require(width > across and height > down, f"no room for the image in {width}x{height}", "outpaint")
        require(max(height, width) <= MAX_SIZE, f"{width}x{height} is more than {MAX_SIZE} a side", "image")
        return height, width

    def fitted(self, height: int, width: int) -> tuple[Source, ...]:
        """Each in this size; equal ones stay one object."""
        done: dict[int, Source] = {}
        for source in self.each:
            if id(source) not in done:
                done[id(source)] = _outpainted(source, self.outpaint, height, width)
        return tuple(done[id(source)] for source in self.each)

    def resized(self, height: int, width: int) -> list[str]:
        """One line for each size that `fitted` brings to another."""
        left, right, top, bottom = (self.sides.get(side, 0) for side in SIDES)
        base = width - left - right, height - top - bottom
        sizes = {source.image.size for source in self.each} - {base}
        return [f"the image of {w}x{h} is resized to {base[0]}x{base[1]}" for w, h in sorted(sizes)]


def check_sources(given: Mapping[str, Any], prompts: int, num_images: int) -> Sources | None:
    """From generate's image, mask_image and outpaint: one for each image, prompt by prompt; None without an image.

    Opens the files. Raises ConfigError for one that is missing or no image, a mask without an image or of another
    size, and lists that are not as long as the prompts'.
    """
    image, mask, outpaint = (given.get(name) for name in ("image", "mask_image", "outpaint"))
    if image is None:
        require(mask is None, "a mask needs an image", "mask_image")
        require(outpaint is None, "outpainting needs an image", "outpaint")
        return None
    sides = None if outpaint is None else check_outpaint(outpaint)
    images, masks = _listed(image, "image", prompts), _listed(mask, "mask_image", prompts)
    read: dict[tuple[int, int], Source] = {}
    for init, over in zip(images, masks):
        if (id(init), id(over)) not in read:
            read[id(init), id(over)] = _read(init, over)
    each = [read[id(init), id(over)] for init, over in zip(images, masks) for _ in range(num_images)]
    return Sources(tuple(each), sides)


def check_area(height: int, width: int, trained: int, factor: int) -> None:
    """Raise ConfigError where an initial image decides a size far beyond what the model was trained on.

    A photo of 12 megapixels would be drawn for hours, if memory lasts, without having been asked for.
    """
    if height * width <= MAX_AREA * trained**2:
        return
    scale = trained / min(height, width)
    fitting = [max(factor, round(side * scale) // factor * factor) for side in (width, height)]
    times = height * width / trained**2
    what = f"the image of {width}x{height} has {times:.0f} times the {trained}x{trained} pixels of the model's training"
    hint = f"give --width {fitting[0]} --height {fitting[1]}, or this size by --width and --height"
    raise ConfigError(what, where="image", hint=hint)


def check_outpaint(value: Any) -> dict[str, int]:
    """{"left": 64, …}: pixels to be added at sides. Raises ConfigError."""
    require(isinstance(value, Mapping), f"expected sides such as left=64, got {value!r:.80}", "outpaint")
    for side in value:
        if side not in SIDES:
            raise ConfigError(f"unknown side {side!r:.80}", where="outpaint", hint=nearest(str(side), SIDES))
    sides = {side: check_int(value[side], f"outpaint {side}", 0, MAX_SIZE) for side in SIDES if side in value}
    require(any(sides.values()), "adds no pixel at any side", "outpaint")
    return sides


def _listed(value: Any, where: str, prompts: int) -> list[Any]:
    """One for each prompt, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return [value] * prompts
    require(len(value) == prompts, f"{len(value)} of them for {prompts} prompts", where)
    require(None not in value, "the list holds None", where)
    return list(value)


def _read(image: Any, mask: Any) -> Source:
    init, name = _opened(image, "image", WHITE)
    found = {"image": name, DIGESTS["image"]: _digest(init)}
    if mask is None:
        return Source(init, None, found)
    grey, name = _mask(mask, init)
    if grey.size != init.size:
        (w, h), (iw, ih) = grey.size, init.size
        raise ConfigError(f"the mask is {w}x{h}, its image {iw}x{ih}", where="mask_image")
    levels = grey.convert("L")
    binary = levels.point(lambda value: 255 if value >= HALF else 0)
    if binary.getbbox() is None:
        brightest = levels.getextrema()[1]
        what = "the mask is black" if brightest == 0 else f"the mask has no white: its brightest grey is {brightest}"
        hint = "paint in white, on black or on nothing"
        raise ConfigError(f"{what}: nothing would be painted", where="mask_image", hint=hint)
    return Source(init, binary, found | {"mask_image": name, DIGESTS["mask_image"]: _digest(grey)})


def _mask(value: Any, init: Image.Image) -> tuple[Image.Image, str]:
    """(the mask as an image, its absolute path or "given"): by its transparency where that carries the shape."""
    mask, name = _opened(value, "mask_image", BLACK)
    alpha = _alpha(value)
    if alpha is None or alpha.size != init.size or numpy.asarray(alpha).min() >= HALF:
        return mask, name
    shape = alpha.point(lambda level: 255 if level >= HALF else 0)
    require(shape.getbbox() is not None, "the mask is transparent everywhere: nothing would be painted", "mask_image")
    inside = numpy.asarray(shape) > 0
    pixels = numpy.asarray(mask)[inside].astype(int)  # (n, 3)
    if numpy.abs(pixels - numpy.asarray(init)[inside]).mean() < SAME:
        console.say("the mask is the image with a hole in it: what is transparent is painted")
        return shape.point(lambda level: 255 - level).convert("RGB"), name
    if _is_black_and_white(pixels):
        console.say("the mask is white and black, and transparent: what is transparent counts as black")
        return mask, name
    console.say("the mask is a stroke on a transparent layer: what is opaque is painted")
    return shape.convert("RGB"), name


def _is_black_and_white(pixels: numpy.ndarray) -> bool:
    """Whether colours (n, 3) are greys, some light and some dark."""
    bright = pixels.max(axis=1) >= HALF
    return bool(numpy.ptp(pixels, axis=1).max() < SAME and bright.any() and not bright.all())


def open_mask(value: Any, where: str) -> tuple[Image.Image, str, str]:
    """(a mask that goes with no image of its size, in RGB; its path or "given"; the sha256 of its pixels).

    White is where something acts. Where transparency varies that is black, or the shape of a stroke of any colour.
    Raises ConfigError, for a mask without white too.
    """
    mask, name = _opened(value, where, BLACK)
    alpha = _alpha(value)
    if alpha is not None and numpy.asarray(alpha).min() < HALF:
        shape = alpha.point(lambda level: 255 if level >= HALF else 0)
        require(shape.getbbox() is not None, "the mask is transparent everywhere: it acts nowhere", where)
        if not _is_black_and_white(numpy.asarray(mask)[numpy.asarray(shape) > 0].astype(int)):
            mask = shape.convert("RGB")
    white = mask.convert("L").point(lambda level: 255 if level >= HALF else 0)
    require(white.getbbox() is not None, "the mask has no white: it acts nowhere", where)
    return mask, name, _digest(mask)


def _alpha(value: Any) -> Image.Image | None:
    """The transparency of an image or its file, upright; None for one without any, or that cannot be opened."""
    if not isinstance(value, Image.Image):
        try:
            with Image.open(spelt_alike(Path(os.path.expanduser(value))), formats=READABLE) as opened:
                return _alpha(opened)
        except (OSError, ValueError, SyntaxError):
            return None
    if value.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in value.info:
        return None
    return ImageOps.exif_transpose(value).convert("RGBA").getchannel("A")


def _opened(value: Any, where: str, background: tuple[int, int, int]) -> tuple[Image.Image, str]:
    """(the image in RGB, upright, transparency laid on `background`; its absolute path, or "given")."""
    if isinstance(value, Image.Image):
        return flatten(ImageOps.exif_transpose(value), background), "given"
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigError(f"expected an image or its file, got {value!r:.80}", where=where)
    path = spelt_alike(Path(os.path.expanduser(value)))
    try:
        with path.open("rb") as file:
            return read_image(file, path, background=background), str(path.resolve())
    except DataError as error:
        raise ConfigError(f"{path}: {error.what}", where=where, hint=error.hint) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = "no such image" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", error)
        raise ConfigError(f"{str(path)!r:.200}: {reason}", where=where) from None


def open_image(value: Any, where: str, background: tuple[int, int, int] = WHITE) -> tuple[Image.Image, str, str]:
    """(an image or its file in RGB, its absolute path or "given", the sha256 of its pixels). Raises ConfigError."""
    image, name = _opened(value, where, background)
    return image, name, _digest(image)


def digests_of(path: Path) -> set[str]:
    """Every sha256 that metadata may keep of a file: as an initial image, as a mask, by its transparency; and as 0.1
    read it, which took all colours for sRGB.

    Raises ConfigError for what is no image.
    """
    found = {_digest(_opened(path, "image", background)[0]) for background in (WHITE, BLACK)}
    if (alpha := _alpha(path)) is not None:
        shape = alpha.point(lambda level: 255 if level >= HALF else 0)
        found |= {_digest(one.convert("RGB")) for one in (shape, shape.point(lambda level: 255 - level))}
    with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(path, formats=READABLE) as opened:
        if colour_profile(opened):
            upright = ImageOps.exif_transpose(opened)
            for name in (*MARKS, "exif"):
                upright.info.pop(name, None)
            found.add(_digest(flatten(upright)))
    return found


def _digest(image: Image.Image) -> str:
    """Of size and pixels, so that an image is the same from a file, from another format, and from memory."""
    return hashlib.sha256(b"%dx%d %s" % (*image.size, image.mode.encode()) + image.tobytes()).hexdigest()


def _outpainted(source: Source, sides: Mapping[str, int] | None, height: int, width: int) -> Source:
    """`source` in this size, including the new `sides`: filled with the image's outermost pixels, to be painted."""
    left, right, top, bottom = (0, 0, 0, 0) if sides is None else (sides.get(side, 0) for side in SIDES)
    inner = (width - left - right, height - top - bottom)
    image, mask = source.image, source.mask
    if image.size != inner:
        image = image.resize(inner, Image.Resampling.LANCZOS)
        mask = None if mask is None else mask.resize(inner, Image.Resampling.NEAREST)
    if sides is None:
        return Source(image, mask, source.metadata)
    around = ((top, bottom), (left, right))
    grown = numpy.pad(numpy.asarray(image), (*around, (0, 0)), mode="edge")
    inside = numpy.zeros(inner[::-1], numpy.uint8) if mask is None else numpy.asarray(mask)
    new = numpy.pad(inside, around, constant_values=255)
    return Source(Image.fromarray(grown), Image.fromarray(new), {**source.metadata, "outpaint": dict(sides)})
