"""Pixels are what their ICC profile says: wherever an image is read it comes out in sRGB, as ImageCms converts it."""

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.colours import ADOBE, P3, SRGB, colour_profile, made_profile, to_srgb
from ldm.data.doctor import check_data
from ldm.data.images import ImageError, read_header, read_image
from ldm.images import flatten
from ldm.pipeline.sources import check_sources, digests_of
from ldm.training.data.images import read_images
from ldm.training.settings import FinetuneData
from tests.data.colour_profiles import icc

WIDE = ["Adobe RGB (1998)", "Display P3", "ProPhoto RGB"]


def colours(size=(48, 40)):
    grey = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (grey, grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT), grey.rotate(90).resize(size)))


def stored(image, format, profile, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, icc_profile=profile, **options)
    return buffer.getvalue()


def wanted(data, mode="RGB"):
    """The pixels by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        image = image.convert(mode) if image.mode != "CMYK" else image
        return np.asarray(ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("name", WIDE)
def test_images_of_every_format_come_out_in_srgb(name, format):
    data = stored(colours(), format, icc(name))
    assert read_header(io.BytesIO(data)).profile == name
    got = read_image(io.BytesIO(data))
    assert got.mode == "RGB" and not colour_profile(got)
    np.testing.assert_array_equal(np.asarray(got), wanted(data))
    plain = stored(colours(), format, b"")
    assert np.abs(np.asarray(read_image(io.BytesIO(plain))).astype(int) - wanted(data)).max() > 20


def test_a_profile_that_is_srgb_changes_no_pixel():
    for profile in (icc("nearly sRGB"), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()):
        data = stored(colours(), "PNG", profile)
        assert read_header(io.BytesIO(data)).profile == ""
        np.testing.assert_array_equal(np.asarray(read_image(io.BytesIO(data))), np.asarray(colours()))


def test_palettes_transparency_greys_and_large_images_too():
    profile = icc("Display P3")
    palette = colours().quantize(64)
    data = stored(palette, "PNG", profile)
    np.testing.assert_array_equal(np.asarray(read_image(io.BytesIO(data))), wanted(data))
    clear = colours().convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 0))
    clear.paste(colours().crop((0, 0, 20, 40)), (0, 0))
    got = np.asarray(read_image(io.BytesIO(stored(clear, "PNG", profile))))
    opaque = wanted(stored(colours(), "PNG", profile))
    np.testing.assert_array_equal(got[:, :20], opaque[:, :20])
    assert (got[:, 20:] == 255).all()
    large = stored(colours((900, 700)), "PNG", profile)
    small = np.asarray(read_image(io.BytesIO(large), at_least=100)).astype(int)
    assert np.abs(small - np.asarray(Image.fromarray(wanted(large)).reduce(3))).max() <= 1
    grey = colours().convert("L")
    data = stored(grey, "PNG", icc("ProPhoto RGB"))  # a profile of colours, which browsers too apply to greys
    expected = wanted(stored(grey.convert("RGB"), "PNG", icc("ProPhoto RGB")))
    np.testing.assert_array_equal(np.asarray(read_image(io.BytesIO(data))), expected)
    assert np.abs(expected[..., 0].astype(int) - np.asarray(grey)).max() > 15


@pytest.mark.parametrize("profile", [b"no profile at all", icc("Display P3")[:300], bytes(3_000_000)])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_a_damaged_or_huge_profile_is_no_reason_to_refuse_an_image(profile, format):
    data = stored(colours(), format, profile)
    assert read_header(io.BytesIO(data)).profile == ""
    plain = np.asarray(read_image(io.BytesIO(stored(colours(), format, b""))))
    np.testing.assert_array_equal(np.asarray(read_image(io.BytesIO(data))), plain)


def test_images_in_memory_and_image_to_image_are_converted(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(stored(colours(), "PNG", icc("ProPhoto RGB")))
    expected = wanted(path.read_bytes())
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(flatten(image)), expected)
        np.testing.assert_array_equal(np.asarray(to_srgb(image)), expected)
        (memory,) = check_sources({"image": image}, 1, 1).each
    (file,) = check_sources({"image": path}, 1, 1).each
    np.testing.assert_array_equal(np.asarray(file.image), expected)
    assert file.metadata["image_sha256"] == memory.metadata["image_sha256"]
    plain = hashlib.sha256(b"48x40 RGB" + colours().tobytes()).hexdigest()  # as ldm 0.1 read it
    assert digests_of(path) >= {file.metadata["image_sha256"], plain}


def test_the_doctor_and_the_trainer_count_them(tmp_path):
    for i in range(3):
        profile = icc("Adobe RGB (1998)") if i else b""
        (tmp_path / f"{i}.png").write_bytes(stored(colours((60 + i, 50)), "PNG", profile))
        (tmp_path / f"{i}.txt").write_text(f"thing {i}")
    (found,) = [f for f in check_data(tmp_path, resolution=64).findings if f.kind == "profile"]
    assert found.what == "2 images have other colours than sRGB (Adobe RGB (1998) 2); they are converted"
    images = read_images(FinetuneData(str(tmp_path), resolution=64))
    assert "2 images are converted to sRGB from Adobe RGB (1998) 2" in images.lines
    assert [bool(item.profile) for item in images.items] == [False, True, True]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks, image=None):
    """A PNG with these chunks before its pixels."""
    data = stored(image or colours(), "PNG", b"")
    return data[:33] + b"".join(chunk(*one) for one in chunks) + data[33:]


def pixels(data):
    return np.asarray(read_image(io.BytesIO(data))).astype(int)


def cHRM(primaries):
    return b"cHRM", struct.pack(">8I", *(round(100_000 * value) for value in primaries))


def test_made_profiles_have_the_colorants_that_are_published():
    made = {"Adobe RGB (1998)": made_profile(*ADOBE, "x"), "Display P3": made_profile(P3, 1 / 2.2, "x")}
    for name, profile in made.items():
        at, known = profile.index(b"rXYZ") + 4, icc(name)
        begin, where = struct.unpack(">I", profile[at : at + 4])[0], known.index(b"rXYZ") + 4
        other = struct.unpack(">I", known[where : where + 4])[0]
        got, expected = (struct.unpack(">3i", p[b + 8 : b + 20]) for p, b in ((profile, begin), (known, other)))
        np.testing.assert_allclose(np.array(got) / 65536, np.array(expected) / 65536, atol=2e-3)


def test_gamma_of_a_png_by_the_closed_form():
    """PNG 13.13: light = number^(1 / gamma), which sRGB's curve stores."""
    linear = np.asarray(colours()) / 255
    expected = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055) * 255
    data = png((b"gAMA", struct.pack(">I", 100_000)))
    assert read_header(io.BytesIO(data)).profile == "gamma 1 of a PNG"
    assert np.abs(pixels(data) - expected).max() <= 1.5
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(flatten(image)), pixels(data))
    for same in (
        [(b"gAMA", struct.pack(">I", 45_455)), cHRM(SRGB)],
        [(b"gAMA", struct.pack(">I", 100_000)), (b"sRGB", b"\0")],
    ):
        assert read_header(io.BytesIO(png(*same))).profile == ""
        np.testing.assert_array_equal(pixels(png(*same)), np.asarray(colours()))


def test_primaries_and_code_points_are_the_profile_that_they_mean():
    """Of a PNG (cHRM, cICP) and an AVIF (nclx); a profile goes before gamma, code points before a profile."""
    expected = pixels(stored(colours(), "PNG", made_profile(P3, None, "P3")))
    assert np.abs(expected - np.asarray(colours())).max() > 20
    np.testing.assert_array_equal(pixels(png((b"gAMA", struct.pack(">I", 45_455)), cHRM(P3))), expected)
    np.testing.assert_array_equal(pixels(png((b"cICP", bytes([12, 13, 0, 1])))), expected)
    adobe = (b"iCCP", b"x\0\0" + zlib.compress(icc("Adobe RGB (1998)")))
    np.testing.assert_array_equal(
        pixels(png(adobe, (b"gAMA", struct.pack(">I", 45_455)), cHRM(P3))), wanted(png(adobe))
    )
    np.testing.assert_array_equal(pixels(png(adobe, (b"cICP", bytes([12, 13, 0, 1])))), expected)
    np.testing.assert_array_equal(pixels(png(adobe, (b"cICP", bytes([1, 13, 0, 1])))), np.asarray(colours()))
    avif = stored(colours(), "AVIF", b"")
    at = avif.index(b"colrnclx") + 8
    coded = avif[:at] + bytes([0, 12, 0, 13]) + avif[at + 4 :]
    np.testing.assert_array_equal(pixels(coded), np.asarray(to_srgb(with_profile(avif, made_profile(P3, None, "P3")))))
    for data in (png((b"cICP", bytes([9, 16, 0, 1]))), avif[:at] + bytes([0, 9, 0, 18]) + avif[at + 4 :]):
        with pytest.raises(ImageError, match=r"has colours that are not read \(HDR colours \((PQ|HLG)\)\); convert"):
            read_image(io.BytesIO(data))


def with_profile(data, profile):
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    image.info["icc_profile"] = profile
    return image


@pytest.mark.parametrize(
    "chunks", [[(b"gAMA", b"\0")], [(b"gAMA", bytes(4))], [(b"cHRM", bytes(32))], [(b"cICP", b"")]]
)
def test_damaged_chunks_about_colours_change_nothing(chunks):
    np.testing.assert_array_equal(pixels(png(*chunks)), np.asarray(colours()))


def test_cameras_mark_adobe_rgb_in_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    for format, options in (("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})):
        data = stored(colours(), format, b"", exif=exif, **options)
        assert read_header(io.BytesIO(data)).profile == "Adobe RGB, by EXIF"
        marked = stored(colours(), format, made_profile(*ADOBE, "x"), exif=exif, **options)
        np.testing.assert_array_equal(pixels(data), pixels(marked))
        assert np.abs(pixels(data) - pixels(stored(colours(), format, b"", **options))).max() > 15


def test_greys_of_16_bits_follow_their_profile():
    numbers = np.linspace(0, 65535, 48 * 40).round().astype(np.uint16).reshape(40, 48)
    data = stored(Image.fromarray(numbers), "PNG", icc("ProPhoto RGB"))
    eight = Image.fromarray(np.repeat((numbers / 257).round().astype(np.uint8)[..., None], 3, 2))
    expected = wanted(stored(eight, "PNG", icc("ProPhoto RGB"))).astype(int)
    assert np.abs(pixels(data) - expected).max() <= 2
    plain = pixels(stored(Image.fromarray(numbers), "PNG", b""))
    np.testing.assert_array_equal(plain[..., 0], (numbers / 257).round())
    assert np.abs(pixels(data) - plain).max() > 15
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(np.asarray(flatten(image)), pixels(data))


def test_cmyk_without_a_profile_is_counted():
    data = stored(colours().convert("CMYK"), "JPEG", b"", quality=100, subsampling=0)
    assert read_header(io.BytesIO(data)).profile == "CMYK without a profile"
    assert np.abs(pixels(data) - np.asarray(colours())).max() <= 6
