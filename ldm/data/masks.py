"""Masks for training on parts of images: an alpha channel, or `NAME-mask.png` beside the image.

White, or opaque, is learned; black, or transparent, is not.
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING

from ldm.data.images import ImageError, read_alpha, read_image
from ldm.data.sources import Sample
from ldm.data.transforms import View, pixels

if TYPE_CHECKING:
    import torch


def read_mask(content: bytes, sample: Sample, view: View, factor: int) -> torch.Tensor | None:
    """The mask of a view, uint8 (1, h, w) with a number for each latent; None where the image has none.

    A file beside the image goes before its alpha channel. Raises DataError where a mask cannot be read, or is not of
    the image's size.
    """
    import torch.nn.functional as F

    if sample.mask is not None:
        with contextlib.closing(_opened(sample)) as file:
            mask = read_image(file, f"mask of {sample.where}")
        if (mask.height, mask.width) != view.original:
            size = f"{mask.width}x{mask.height}"
            raise ImageError("its mask is of another size", size, where=sample.where, hint="make it of the same size")
    else:
        alpha = read_alpha(io.BytesIO(content), sample.where)
        if alpha is None:
            return None
        mask = alpha.convert("RGB")
    whole = pixels(mask, view)[:1].float()
    return F.avg_pool2d(whole, factor).round().byte()


def _opened(sample: Sample):
    assert sample.mask is not None
    try:
        return sample.mask()
    except OSError as error:
        raise ImageError("its mask cannot be opened", error.strerror or str(error), where=sample.where) from None
