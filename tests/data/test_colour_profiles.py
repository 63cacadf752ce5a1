"""Pixels are what their ICC profile says: wherever an image is read it comes out in sRGB, as ImageCms converts it."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from ldm.data.doctor import check_data
from ldm.data.images import read_header, read_image
from ldm.images import colour_profile, flatten, to_srgb
from ldm.pipeline.sources import check_sources
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
    grey = stored(colours().convert("L"), "PNG", profile)  # a profile of colours does not fit it
    np.testing.assert_array_equal(np.asarray(read_image(io.BytesIO(grey)))[..., 0], np.asarray(colours().convert("L")))


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
