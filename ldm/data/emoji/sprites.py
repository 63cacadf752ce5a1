"""Images of single objects, from the Noto Color Emoji font."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.data.emoji.table import find
from ldm.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PLACES = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",  # Fedora
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",
    "~/.local/share/fonts/NotoColorEmoji.ttf",
)
NAME = "Noto Color Emoji"
STRIKE = 109  # the only pixel size of the font's bitmaps
BITMAP = (136, 128)  # width, height of one bitmap
HINT = "install it (Debian: apt install fonts-noto-color-emoji) or name its file with --font FILE"


def find_font(font: str | Path | None = None) -> Path:
    """The font file: `font`, or the first that exists of the usual places.

    Raises DataError, which says how to install the font, where there is none or the file is another font.
    """
    places = [Path(os.path.expanduser(p)) for p in ((font,) if font else PLACES)]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise DataError("the font Noto Color Emoji was not found", where=font, hint=HINT)
    _open(path)
    return path


@functools.lru_cache(maxsize=8)
def _open(path: Path):
    from PIL import ImageFont

    try:
        font = ImageFont.truetype(str(path), STRIKE)
    except OSError as error:
        raise DataError(f"not a font with bitmaps of {STRIKE} pixels ({error})", where=path, hint=HINT) from None
    if font.getname()[0] != NAME:  # another font would draw a box for a missing character
        raise DataError(f"is the font {font.getname()[0]}, not {NAME}", where=path, hint=HINT)
    return font


@functools.lru_cache(maxsize=1024)
def sprite(char: str, font: Path) -> Image:
    """One object as RGBA: the font's own bitmap, cropped to what is visible and padded to a square.

    Raises DataError where the font draws nothing.
    """
    from PIL import Image, ImageDraw

    canvas = Image.new("RGBA", (2 * BITMAP[0], BITMAP[1]), (0, 0, 0, 0))  # wide enough to see an unjoined sequence
    ImageDraw.Draw(canvas).text((0, 0), char, font=_open(Path(font)), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None or box[2] > BITMAP[0]:
        raise DataError(f"the font has no image of '{find(char).name}'", where=font, hint=HINT)
    side = max(box[2] - box[0], box[3] - box[1])
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(canvas.crop(box), ((side - box[2] + box[0]) // 2, (side - box[3] + box[1]) // 2))
    return square


@functools.lru_cache(maxsize=4096)  # about 40 KB each
def scaled(char: str, size: int, font: Path) -> Image:
    """The sprite at `size` × `size` pixels."""
    from PIL import Image

    return sprite(char, font).resize((size, size), Image.Resampling.LANCZOS)
