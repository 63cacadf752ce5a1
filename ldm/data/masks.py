"""Masks for training on parts of images: an alpha channel, or `NAME-mask.png` beside the image.

White, or opaque, is learned; black, or transparent, is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from ldm.data.images import MAX_FILE, ImageError, opened, read_image, scale, upright
from ldm.data.sources import Sample
from ldm.data.transforms import View, pixels

if TYPE_CHECKING:
    import torch
    from PIL import Image

ALPHA = "alpha"  # in place of the digest of a file


def whole_mask(content: bytes, sample: Sample, size: tuple[int, int]) -> tuple[Image.Image | None, str]:
    """The mask of an image in RGB, upright, and the sha256 of its file, ALPHA, or "" and None where it has none.

    `content` is the image's file, `size` its height and width. A file beside the image goes before its alpha channel.
    Raises ImageError where a mask cannot be read, is not of the image's size, or shows nothing.
    """
    if sample.mask is not None:
        beside = _beside(sample)
        mask, kind = read_image(io.BytesIO(beside), f"mask of {sample.where}"), hashlib.sha256(beside).hexdigest()
        if (mask.height, mask.width) != tuple(size):
            told = f"{mask.width}x{mask.height}"
            raise ImageError("its mask is of another size", told, where=sample.where, hint="make it of the same size")
    else:
        alpha = read_alpha(io.BytesIO(content), sample.where)
        if alpha is None:
            return None, ""
        mask, kind = alpha.convert("RGB"), ALPHA
    if mask.getbbox() is None:
        raise ImageError("its mask shows nothing", where=sample.where, hint="white, or opaque, is what is learned")
    return mask, kind


def read_mask(content: bytes, sample: Sample, view: View, factor: int) -> tuple[torch.Tensor | None, str]:
    """The mask of a view, uint8 (1, h, w) with a number for each latent, and its kind, as `whole_mask` has them."""
    import torch.nn.functional as F

    mask, kind = whole_mask(content, sample, view.original)
    if mask is None:
        return None, kind
    return F.avg_pool2d(pixels(mask, view)[:1].float(), factor).round().byte(), kind


def mask_line(kinds: Sequence[str]) -> str:
    """How many of the images have a mask of which kind; `kinds` are as `whole_mask` has them."""
    alpha, none = kinds.count(ALPHA), kinds.count("")
    told = f"masks: {len(kinds) - alpha - none} files NAME-mask.png, {alpha} alpha channels"
    return f"{told}; the other {none} images are learned as a whole" if none else told


def read_alpha(file: BinaryIO, where: object = None) -> Image.Image | None:
    """The alpha channel of the first frame, upright, as an image of mode L; None where nothing is transparent.

    Raises ImageError as `read_image` does.
    """
    with opened(file, where) as (image, header):
        if not header.transparent:
            return None
        scale(image, header, None)
        return upright(image.convert("RGBA").getchannel("A"), header)


def _beside(sample: Sample) -> bytes:
    assert sample.mask is not None
    try:
        with contextlib.closing(sample.mask()) as file:
            return file.read(MAX_FILE + 1)
    except OSError as error:
        raise ImageError("its mask cannot be opened", error.strerror or str(error), where=sample.where) from None
