"""Reading image files of any origin: the header without decoding, or the pixels, upright and in RGB.

`file` is always a binary file that can seek. Only pixels, EXIF's orientation and what a file says of its colours are
read: texts and thumbnails are ignored, whatever their size or state.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ldm.colours import MARKS, coded_profile, colour_profile, to_srgb
from ldm.data.image_kinds import kind_of
from ldm.data.png import PIXELS, without_texts
from ldm.data.to_rgb import to_rgb
from ldm.errors import DataError, one_line
from ldm.files import format_bytes
from ldm.images import READABLE

if TYPE_CHECKING:
    from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
MAX_MEMORY = 198_000_000  # bytes that reading one image may take
MAX_PIXELS = 64_000_000
DECODING = {"WEBP": 16, "AVIF": 10, "GIF": 2}  # measured bytes per pixel while the whole image is decoded
# bytes per pixel by mode in the other formats, else 4
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2}
PROGRESSIVE = 3  # bytes per pixel that a progressive JPEG needs beside its pixels
MAX_FILE = 200_000_000  # bytes
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> PIL.Image.Transpose that undoes it
ORIENTATION = 0x0112
AVIF_HEAD = 1 << 16  # bytes in which an AVIF tells its colours


class ImageError(DataError):
    """A file whose pixels cannot be read; `reason` is the same for all that fail in the same way, for counting."""

    def __init__(self, reason: str, detail: str = "", *, where: object = None, hint: str | None = None):
        self.reason, self.detail = reason, one_line(detail)
        super().__init__(f"{reason} ({self.detail})" if detail else reason, where=where, hint=hint)


@dataclass(frozen=True)
class Header:
    """What a file's header says about its image."""

    format: str  # Pillow's name: PNG, JPEG, …
    mode: str  # Pillow's name: RGB, P, CMYK, I;16, …
    width: int  # pixels, upright
    height: int
    orientation: int = 1  # EXIF's 1 to 8
    animated: bool = False  # the first frame is read
    transparent: bool = False  # has an alpha channel, or a transparent colour or palette entry
    profile: str = ""  # from which its colours are converted to sRGB: the name of its ICC profile, or what else tells


def read_header(file: BinaryIO, where: object = None) -> Header:
    """Size and format without decoding. Raises ImageError for files that are no readable image or too large."""
    with opened(file, where) as (image, header):
        scale(image, header, 1)
        return header


def read_image(
    file: BinaryIO, where: object = None, at_least: int | None = None, background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """The first frame in RGB (sRGB), upright, composited on `background`, 16 bits scaled to 8.

    With `at_least` a large image may be reduced by a whole factor, its shorter side never below twice `at_least`
    pixels. Raises ImageError, and nothing else, for files that cannot be read or would take too much memory.
    """

    with opened(file, where) as (image, header):
        factor = scale(image, header, at_least)
        if image.mode == "RGB" and factor == 1 and "transparency" not in image.info and not header.profile:
            image.load()
            result = image
        else:
            result = to_rgb(image, factor, background)
        return upright(result, header)


def read_with_alpha(file: BinaryIO, where: object = None) -> Image.Image:
    """The first frame in RGBA (sRGB), upright; where it is opaque everywhere in RGB, as `read_image` gives it.

    A 16-bit grey image is flattened on black. Raises ImageError as `read_image` does.
    """
    with opened(file, where) as (image, header):
        scale(image, header, None)
        if header.transparent and not image.mode.startswith("I"):
            result = upright(to_srgb(image).convert("RGBA"), header)
            result.info = {}  # its profile was used
            if result.getextrema()[3][0] < 255:
                return result
    file.seek(0)
    return read_image(file, where, background=BLACK)


def upright(image: Image.Image, header: Header) -> Image.Image:
    """The image as EXIF says that it is seen."""
    from PIL import Image

    turn = UPRIGHT.get(header.orientation) if header.format != "TIFF" else None
    return image if turn is None else image.transpose(Image.Transpose(turn))


@contextlib.contextmanager
def opened(file: BinaryIO, where: object) -> Iterator[tuple[Image.Image, Header]]:
    """The image, not decoded yet, and its header; every exception inside the block becomes ImageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        start = file.read(512)
        size = file.seek(0, io.SEEK_END)
        if not size:
            raise ImageError("is empty", "0 bytes", where=where)
        if size > MAX_FILE:
            raise ImageError(
                "file is too large", f"{format_bytes(size)}, {format_bytes(MAX_FILE)} at most", where=where
            )
        file.seek(0)
        animated, codes = False, None
        if start.startswith(PNG) and not _is_plain(file, size):
            file, animated, codes = without_texts(file)
        elif start[4:8] == b"ftyp":
            codes = _nclx(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes and damaged EXIF
            with Image.open(file, formats=READABLE) as image:
                if codes and (image.format == "PNG" or not image.info.get("icc_profile")):
                    _use_codes(image, codes)
                yield image, _header(image, animated)
    except ImageError as error:
        raise ImageError(error.reason, error.detail, where=where, hint=error.hint) from None
    except UnidentifiedImageError:
        raise ImageError(*kind_of(start), where=where) from None
    except Image.DecompressionBombError:
        raise ImageError("is too large an image", "its header declares a bomb", where=where) from None
    except MemoryError:
        raise ImageError("is too large an image", "out of memory", where=where) from None
    except Exception as error:  # decoders raise many types on damaged files: struct.error, IndexError, …
        raise ImageError("is damaged or cut short", str(error) or type(error).__name__, where=where) from None


def _header(image: Image.Image, animated: bool) -> Header:
    width, height = image.size
    orientation = 1
    with contextlib.suppress(Exception):  # broken EXIF: the image stays as it is
        if image.format != "PNG" or "exif" in image.info:  # Pillow would decode a PNG to search for it
            value = image.getexif().get(ORIENTATION)
            orientation = value if value in UPRIGHT else 1
    if orientation >= 5 and image.format != "TIFF":  # quarter turns; Pillow turns TIFFs itself
        width, height = height, width
    if image.format != "PNG":
        with contextlib.suppress(Exception):
            animated = image.format != "TIFF" and bool(getattr(image, "is_animated", False))
    transparent = ("A" in image.mode.upper() and image.mode != "LAB") or "transparency" in image.info
    profile = ""
    with contextlib.suppress(Exception):  # a broken profile: the numbers are taken as they are
        profile = colour_profile(image) or ("CMYK without a profile" if image.mode == "CMYK" else "")
    return Header(image.format, image.mode, width, height, orientation, animated, transparent, profile)


def scale(image: Image.Image, header: Header, at_least: int | None) -> int:
    """The whole factor by which the image is reduced while decoding; a JPEG is set to decode at reduced size.

    Raises ImageError where reading would take more than MAX_MEMORY.
    """
    width, height = image.size
    each = DECODING.get(header.format) or STORED.get(image.mode, 4)
    kept = 0
    if header.format == "JPEG":
        kept = PROGRESSIVE * width * height if image.info.get("progressive") else 0
        if at_least:
            image.draft(None, (2 * at_least, 2 * at_least))
    factor = max(1, min(image.size) // (2 * at_least)) if at_least else 1
    upright = 0 if header.orientation == 1 else 4
    each += upright if header.format == "TIFF" else 0  # turned before it is made smaller
    copied = 0 if image.mode == "RGB" and factor == 1 and not header.profile else 4
    decoded = each - 4 if header.format in DECODING else each  # bytes a pixel that stay beside the copies
    needed = kept + image.width * image.height * max(each, decoded + (copied + upright) / factor**2)
    if width * height > MAX_PIXELS or needed > MAX_MEMORY:
        detail = f"{width}x{height} {header.format} takes {format_bytes(needed)}, {format_bytes(MAX_MEMORY)} at most"
        if width * height > MAX_PIXELS:
            detail = f"{width}x{height}, {MAX_PIXELS / 1e6:.0f} megapixels at most"
        raise ImageError("is too large an image", detail, hint="make it smaller")
    return factor


def _is_plain(file: BinaryIO, size: int) -> bool:
    """Whether a PNG holds its pixels and nothing else."""
    position, kind = 8, b""
    while position + 8 <= size and kind != b"IEND":
        file.seek(position)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind not in PIXELS:
            return False
        position += 12 + length
    file.seek(0)
    return position == size


def _nclx(file: BinaryIO) -> tuple[int, int] | None:
    """(primaries, transfer) of H.273 in an AVIF's head; None where it has none."""
    file.seek(0)
    _, found, codes = file.read(AVIF_HEAD).partition(b"colrnclx")
    file.seek(0)
    return (int.from_bytes(codes[:2], "big"), int.from_bytes(codes[2:4], "big")) if found else None


def _use_codes(image: Image.Image, codes: tuple[int, int]) -> None:
    """Set the profile that code points mean, in place of whatever else the file says of its colours."""
    try:
        profile = coded_profile(*codes)
    except ValueError as error:
        raise ImageError("has colours that are not read", str(error), hint="convert it to sRGB") from None
    for name in MARKS:
        image.info.pop(name, None)
    image.info |= {"icc_profile": profile} if profile else {"srgb": 0}
