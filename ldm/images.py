"""Images: PIL to tensor and back, grids, and files that carry how they were made.

A PNG carries two text chunks: `parameters`, one text that A1111 and its relatives read, and `ldm`, our own JSON.
JPEG and WebP carry the same two in EXIF: UserComment (where A1111 looks for it) and MakerNote.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.colours import grey_curve, to_srgb
from ldm.errors import ConfigError, DataError, NumericsError, nearest

if TYPE_CHECKING:
    import torch
    from PIL import Image

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # file suffix -> Pillow's name
SUFFIXES = {".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF", ".avif": "AVIF"}
SUFFIXES |= dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG") | dict.fromkeys((".tif", ".tiff"), "TIFF")
READABLE = tuple(dict.fromkeys(SUFFIXES.values()))  # of Pillow's 40 decoders, those that are opened
EXIF_IFD, USER_COMMENT, MAKER_NOTE = 0x8769, 0x9286, 0x927C
EXIF_LIMIT = 65_000  # bytes; a JPEG segment holds 65,533
_NOT_AN_IMAGE = (OSError, ValueError, SyntaxError, RuntimeError, EOFError)  # what Pillow raises on damaged files


@dataclass(frozen=True)
class Metadata:
    """How an image was made: A1111's `parameters` text and our own `ldm` mapping; either may be empty."""

    parameters: str = ""
    ldm: dict[str, Any] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # a PNG's other texts; read, never written


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """`images` (B, 3, H, W) in [-1, 1] -> B RGB images. Raises NumericsError on NaN or infinity."""
    import torch
    from PIL import Image

    images = images.detach().float().cpu()
    if not torch.isfinite(images).all():
        raise NumericsError("the image holds NaN or infinity", hint="use dtype fp32")
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p.permute(1, 2, 0).contiguous().numpy()) for p in pixels]  # (H, W, 3)


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> torch.Tensor:
    """Images of one size -> (B, 3, H, W) fp32 in [-1, 1]; transparency is laid on white.

    Raises DataError where the sizes differ.
    """
    import numpy
    import torch

    flat = [flatten(image) for image in (images if isinstance(images, Sequence) else [images])]
    sizes = sorted({image.size for image in flat})
    if len(sizes) != 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sizes) or "none"
        raise DataError(f"images of one size are needed, got {listed}")
    pixels = torch.from_numpy(numpy.stack([numpy.asarray(image) for image in flat]))  # (B, H, W, 3)
    return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def flatten(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An RGB image in sRGB: transparency composited on `background`, 16-bit grey scaled rather than clipped."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return _flatten_16_bits(image, background)
    image = to_srgb(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I":
        grey = image.point(lambda value: value / 257)
        return grey.convert("L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (*background, 255)), over).convert("RGB")
    return image.convert("RGB")


def _flatten_16_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    import numpy
    from PIL import Image

    numbers = numpy.asarray(image).astype(numpy.uint16)
    levels, curve = numbers / 257, grey_curve(image)
    if curve is None:
        colours = numpy.repeat(levels[:, :, None], 3, axis=2)
    else:
        colours = numpy.stack([numpy.interp(levels, numpy.arange(256), column) for column in curve.T], axis=2)
    colours = colours.round().astype(numpy.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        colours[numbers == clear] = background
    return Image.fromarray(colours)


def grid(images: Sequence[Image.Image], columns: int | None = None, gap: int = 0) -> Image.Image:
    """All images on one white sheet, row by row; about as many columns as rows unless `columns` says otherwise."""
    from PIL import Image

    if not images:
        raise DataError("a grid needs at least one image")
    if columns is not None and columns < 1:
        raise ConfigError(f"a grid needs at least one column, got {columns}", where="columns")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def file_format(name: str) -> str:
    """png, jpg or webp for a format name or suffix in any spelling. Raises ConfigError for any other."""
    key = name.lower().lstrip(".")
    key = {"jpeg": "jpg"}.get(key, key)
    if key not in FORMATS:
        raise ConfigError(f"unknown image format {name!r}", where="format", hint=nearest(key, FORMATS))
    return key


def encode(image: Image.Image, format: str = "png", metadata: Metadata | None = None) -> bytes:
    """The bytes of a png, jpg or webp file, with `metadata` inside where it is given.

    A JPEG holds 64 kB of it: what does not fit is left out, our JSON first, with a warning.
    """
    format = file_format(format)
    options: dict[str, Any] = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 92}}[format]
    if metadata and format == "png":
        options["pnginfo"] = _png_text(metadata)
    elif metadata:
        options["exif"] = _exif_within_limit(metadata) if format == "jpg" else _exif(metadata)
    buffer = io.BytesIO()
    image.save(buffer, FORMATS[format], **options)
    return buffer.getvalue()


def _png_text(metadata: Metadata):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    if metadata.parameters:
        chunks.add_text("parameters", metadata.parameters)
    if metadata.ldm:
        chunks.add_text("ldm", json.dumps(metadata.ldm, ensure_ascii=False))
    return chunks


def _exif(metadata: Metadata) -> bytes:
    from PIL import Image

    exif = Image.Exif()
    private = exif.get_ifd(EXIF_IFD)
    if metadata.parameters:
        private[USER_COMMENT] = b"UNICODE\0" + metadata.parameters.encode("utf-16-be")
    if metadata.ldm:
        private[MAKER_NOTE] = b"ldm\0" + json.dumps(metadata.ldm).encode("ascii")
    return exif.tobytes()


def _exif_within_limit(metadata: Metadata) -> bytes:
    from ldm.console import warn

    for kept in (metadata, Metadata(metadata.parameters), Metadata()):
        exif = _exif(kept)
        if len(exif) <= EXIF_LIMIT:
            if kept is not metadata:
                lost = "the ldm metadata" if kept.parameters else "all metadata"
                warn(f"a JPEG holds 64 kB of metadata: {lost} is left out; use --format png to keep it")
            return exif
    return b""


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of a PNG, JPEG or WebP file, by us or by other tools; empty where there is none.

    Raises DataError for a file that is no image.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own about sizes and damaged EXIF: only the text is read
            with Image.open(path, formats=READABLE) as image:
                if image.format == "PNG":
                    image.load()  # text chunks may follow the pixels
                    text = {name: str(value) for name, value in getattr(image, "text", {}).items()}
                    return Metadata(text.pop("parameters", ""), _json_object(text.pop("ldm", "")), text)
                private = image.getexif().get_ifd(EXIF_IFD)
    except _NOT_AN_IMAGE as error:
        raise DataError(f"cannot be read as an image ({error})", where=path) from None
    note = private.get(MAKER_NOTE, b"")
    own = note[4:].decode("ascii", "replace") if isinstance(note, bytes) and note.startswith(b"ldm\0") else ""
    return Metadata(_user_comment(private.get(USER_COMMENT, b"")), _json_object(own))


def _user_comment(value: bytes | str) -> str:
    """EXIF UserComment: eight bytes that name the encoding, then the text (UTF-16, in either order, or ASCII)."""
    if isinstance(value, str):
        return value
    code, body = value[:8], value[8:]
    if not code.startswith(b"UNICODE"):
        return body.decode("utf-8", "replace").rstrip("\0")
    little = body[:2] == b"\xff\xfe" or body[1::2].count(0) > body[0::2].count(0)
    return body.decode("utf-16-le" if little else "utf-16-be", "replace").lstrip("\ufeff").rstrip("\0")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
