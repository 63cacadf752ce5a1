"""The colours that an image file means, brought to sRGB.

An ICC profile says which they are; without one a PNG's gamma and primaries (gAMA, cHRM), code points (a PNG's cICP, an
AVIF's nclx; ITU-T H.273) or a camera's mark of Adobe RGB in EXIF. These become a profile: one transform serves all.
"""

from __future__ import annotations

import contextlib
import io
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    from PIL import Image

SAME = 2  # levels of 255 by which a profile may differ from sRGB and counts as sRGB
D65, DCI = (0.3127, 0.3290), (0.314, 0.351)  # white points, (x, y)
SRGB = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x, y of white, red, green and blue
ADOBE = (*D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06), 1 / 2.19921875
BT2020, P3 = (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046), (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
PAL = (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06)
NTSC = (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070)
CODED_PRIMARIES = {5: PAL, 6: NTSC, 7: NTSC, 9: BT2020, 11: (*DCI, *P3[2:]), 12: P3}  # H.273, table 2; others: sRGB
CODED_GAMMA = {5: 1 / 2.8, 8: 1.0}  # H.273, table 3; others have about sRGB's curve, but for HDR
HDR = {16: "PQ", 18: "HLG"}
PLAIN_GAMMA, NEAR = 1 / 2.2, 0.05  # of a PNG; within this share of it libpng takes it for sRGB's curve
INTEROP_IFD, INTEROP_INDEX = 0xA005, 1  # of EXIF: "R03" is Adobe RGB (DCF 2.0, option file)
D50 = (0.9642, 1.0, 0.8249)  # XYZ of an ICC profile's white
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))


def to_srgb(image: Image.Image) -> Image.Image:
    """The image with its colours in sRGB; itself where they are that, or to within two levels of 255.

    A profile that is damaged or of another kind of image is ignored.
    """
    found = _transform_of(image)
    if not found:
        return image
    _, transform, mode = found
    clear = _clear_mode(image)
    plain = image if clear is None else image.convert(clear)
    alpha = None if clear is None else plain.getchannel("A")
    converted = transform.apply(plain.convert(mode))
    converted.info = {name: value for name, value in converted.info.items() if name not in MARKS}
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def colour_profile(image: Image.Image) -> str:
    """The name of what makes an image's colours others than sRGB's; "" where they are sRGB's."""
    found = _transform_of(image)
    return found[0] if found else ""


def grey_curve(image: Image.Image) -> numpy.ndarray | None:
    """The sRGB colours, uint8 (256, 3), of the levels of an image of greys; None where they are what they are."""
    import numpy
    from PIL import Image

    found = _srgb_transform(profile_of(image) or b"", "L")
    if not found:
        return None
    levels = Image.fromarray(numpy.arange(256, dtype=numpy.uint8)[None]).convert(found[2])
    return numpy.asarray(found[1].apply(levels))[0]


# Which profile

MARKS = ("icc_profile", "gamma", "chromaticity", "srgb")  # of PIL's info


def profile_of(image: Image.Image) -> bytes | None:
    """An ICC profile for the colours of an image: its own, or one made of what else its file says."""
    info = image.info
    if isinstance(profile := info.get("icc_profile"), bytes) and profile:
        return profile
    if "srgb" in info:  # goes before gamma and primaries (PNG 4.3)
        return None
    if "gamma" in info or "chromaticity" in info:
        return _of_png(info.get("gamma"), info.get("chromaticity"))
    return made_profile(*ADOBE, "Adobe RGB, by EXIF") if _is_adobe_by_exif(image) else None


def _of_png(gamma: Any, primaries: Any) -> bytes | None:
    plain = gamma is None or abs(gamma - PLAIN_GAMMA) <= NEAR * PLAIN_GAMMA
    name = ", ".join(
        [*([] if plain else [f"gamma {1 / gamma:.3g}" if gamma else "gamma"]), *(["primaries"] if primaries else [])]
    )
    return made_profile(tuple(primaries or SRGB), None if plain else gamma, f"{name} of a PNG")


def coded_profile(primaries: int, transfer: int) -> bytes | None:
    """The profile of H.273's code points; None for sRGB's. Raises ValueError for HDR, which has no place in 8 bits."""
    if transfer in HDR:
        raise ValueError(f"HDR colours ({HDR[transfer]})")
    if primaries not in CODED_PRIMARIES and transfer not in CODED_GAMMA:
        return None
    name = f"code points {primaries}/{transfer}"
    return made_profile(CODED_PRIMARIES.get(primaries, SRGB), CODED_GAMMA.get(transfer), name)


def _is_adobe_by_exif(image: Image.Image) -> bool:
    if "exif" not in image.info:
        return False
    with contextlib.suppress(Exception):  # broken EXIF
        return str(image.getexif().get_ifd(INTEROP_IFD).get(INTEROP_INDEX, "")).strip("\0 ") == "R03"
    return False


@lru_cache(maxsize=32)
def made_profile(primaries: tuple[float, ...], gamma: float | None, name: str) -> bytes | None:
    """An ICC profile (ICC.1:2001-04, three-component matrix) of these primaries; None where they span nothing.

    primaries  x, y of white, red, green and blue
    gamma      exponent that made the stored numbers out of light; None is sRGB's curve
    """
    import numpy

    if gamma is not None and not 0.1 <= gamma <= 10:
        return None
    try:
        white, *colours = (
            numpy.array([x / y, 1.0, (1 - x - y) / y]) for x, y in zip(primaries[::2], primaries[1::2], strict=True)
        )
        columns = numpy.stack(colours, 1)
        columns = columns * numpy.linalg.solve(columns, white)  # they add up to white
        bradford = numpy.array(BRADFORD)
        adapted = numpy.diag(bradford @ D50 / (bradford @ white))
        columns = numpy.linalg.solve(bradford, adapted @ bradford @ columns)
    except (ZeroDivisionError, ValueError, numpy.linalg.LinAlgError):
        return None
    if not numpy.isfinite(columns).all() or numpy.abs(columns).max() > 8:
        return None
    curve = _srgb_curve() if gamma is None else struct.pack(">IH", 1, round(256 / gamma))
    text = name.encode("ascii", "replace") + b"\0"
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78), b"cprt": b"text\0\0\0\0-\0"}
    tags |= {b"wtpt": _xyz(D50)} | {bytes([letter]) + b"TRC": b"curv\0\0\0\0" + curve for letter in b"rgb"}
    tags |= {bytes([letter]) + b"XYZ": _xyz(column) for letter, column in zip(b"rgb", columns.T, strict=True)}
    table, body, begin = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", begin + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">III", begin + len(body), 0, 0x02400000) + b"mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    return (head + _xyz(D50)[8:]).ljust(128, b"\0") + table + body


def _xyz(values: Any) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _srgb_curve() -> bytes:
    """IEC 61966-2-1 in 1024 steps."""
    steps = (i / 1023 for i in range(1024))
    light = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in steps)
    return struct.pack(">I1024H", 1024, *(round(65535 * value) for value in light))


# The transform


def _transform_of(image: Image.Image):
    """(name, transform, the mode it takes) of an image's colours; None where they stay as they are."""
    mode = {"P": "RGB", "PA": "RGB", "RGBX": "RGB", "RGBa": "RGB", "RGBA": "RGB", "La": "L", "LA": "L", "YCbCr": "RGB"}
    plain = mode.get(image.mode, "L" if image.mode.startswith("I;16") else image.mode)
    profile = profile_of(image) if plain in ("RGB", "L", "CMYK") else None
    return _srgb_transform(profile, plain) if profile else None


def _clear_mode(image: Image.Image) -> str | None:
    """The mode with an alpha channel of an image that is transparent somewhere."""
    if "A" not in image.mode.upper() and "transparency" not in image.info:
        return None
    return "LA" if image.mode in ("L", "LA", "La") else "RGBA"


@lru_cache(maxsize=32)
def _srgb_transform(profile: bytes, mode: str):
    """(the profile's name, Pillow's transform to RGB in sRGB, the mode it takes); None where it would change nothing.

    Greys may have a profile of colours, as browsers allow: then the mode is RGB.
    """
    import numpy
    from PIL import Image, ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            mode = "RGB"
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        name = " ".join(ImageCms.getProfileDescription(source).split()) or "unnamed"
    except (ImageCms.PyCMSError, ImportError, OSError, ValueError, TypeError):
        return None
    if mode != "CMYK":
        levels = numpy.linspace(0, 255, 9).round().astype(numpy.uint8)
        axes = numpy.meshgrid(*[levels] * len(mode), indexing="ij") if mode == "RGB" else [numpy.arange(256)]
        cube = numpy.stack(axes, -1).reshape(-1, len(axes)).astype(numpy.uint8)  # (N, channels)
        chart = Image.fromarray(cube[None] if mode == "RGB" else cube.T)
        apart = numpy.asarray(transform.apply(chart)).astype(int) - numpy.asarray(chart.convert("RGB")).astype(int)
        if numpy.abs(apart).max() <= SAME:
            return None
    return name, transform, mode
