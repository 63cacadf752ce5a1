"""Pixels of any mode as RGB, in 8 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ldm.images import flatten

if TYPE_CHECKING:
    from PIL import Image

BAND = 250_000  # pixels that are converted at once


def to_rgb(image: Image.Image, factor: int, background: tuple[int, int, int]) -> Image.Image:
    """The image in RGB, `factor` times smaller, composited on `background`, 16 bits scaled to 8.

    It is converted in bands of about BAND pixels to save memory. Raises ValueError for pixels that are no numbers.
    """
    from PIL import Image

    levels = _levels(image)
    image.load()
    width, height = image.size
    rows = max(factor, BAND // width // factor * factor)
    result = Image.new("RGB", (math.ceil(width / factor), math.ceil(height / factor)))
    for top in range(0, height, rows):
        band = _rgb(image.crop((0, top, width, min(height, top + rows))), background, levels)
        result.paste(band.reduce(factor) if factor > 1 else band, (0, top // factor))
    return result


def _levels(image: Image.Image) -> tuple[float, float] | None:
    """(black, white) of an image of 32-bit numbers; None for the other modes.

    The range is 16 bits for integers within it, and 0 to 1 for floats within it; else it is that of the pixels.
    """
    if image.mode not in ("I", "F"):
        return None
    low, high = image.getextrema()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("its pixels are not finite numbers")
    white = 65535.0 if image.mode == "I" else 1.0
    return (0.0, white) if low >= 0 and high <= white else (low, max(high, low + 1e-6))


def _rgb(band: Image.Image, background: tuple[int, int, int], levels: tuple[float, float] | None) -> Image.Image:
    import numpy as np
    from PIL import Image

    if levels is not None:
        low, high = levels
        grey = (np.asarray(band, np.float64) - low) * (255 / (high - low))
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    return flatten(band, background)
