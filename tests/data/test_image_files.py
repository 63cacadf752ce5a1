"""Images of every kind come out upright, in RGB and as they look elsewhere (faults C 22-31)."""

import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from ldm.data.images import MAX_FILE, ImageError, read_header, read_image
from ldm.images import READABLE

LOSSY = {"JPEG": 3, "WEBP": 6, "AVIF": 6}  # greatest difference of a smooth image


def smooth(size=(48, 32)):
    plain = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (plain, plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT), plain.rotate(180)))


def file_of(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def read(data, **options):
    return np.asarray(read_image(io.BytesIO(data), "x", **options)).astype(int)


def header(data):
    return read_header(io.BytesIO(data), "x")


@pytest.mark.parametrize("format", READABLE)
def test_every_format_is_read_as_it_was_drawn(format):
    image = smooth() if format != "GIF" else smooth().quantize(256).convert("RGB").quantize(256)
    data = file_of(image, format, **({"quality": 95} if format in LOSSY else {}))
    said = header(data)
    assert (said.format, said.width, said.height, said.orientation, said.animated) == (format, 48, 32, 1, False)
    difference = np.abs(read(data) - np.asarray(image.convert("RGB")).astype(int))
    assert difference.max() <= LOSSY.get(format, 0) * 3 and difference.mean() <= LOSSY.get(format, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_equals_the_image_turned_beforehand(format, orientation):  # fault C 28
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    data = file_of(smooth(), format, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as image:
        turned = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert (read(data) == turned).all()
    assert (header(data).height, header(data).width) == turned.shape[:2]


def test_orientation_after_the_pixels_and_a_broken_one():  # faults C 28, 31
    data = file_of(smooth(), "PNG")
    end = data.index(b"IEND") - 4
    body = b"eXIf" + b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    late = data[:end] + chunk + data[end:]
    assert header(late).orientation == 6 and read(late).shape == (48, 32, 3)
    broken = chunk[:-1] + bytes([chunk[-1] ^ 1])  # a wrong checksum: the image is taken as it lies
    assert read(data[:end] + broken + data[end:]).shape == (32, 48, 3)
    for exif in (b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"\xff" * 3000):
        assert read(file_of(smooth(), "JPEG", exif=exif)).shape == (32, 48, 3)


def test_texts_and_profiles_of_any_size_do_not_matter():  # fault C 31
    texts = PngInfo()
    texts.add_text("parameters", "a" * 3_000_000, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", "b" * 3_000_000, zip=True)
    noise = np.random.default_rng(0).bytes(2_000_000)
    data = file_of(smooth(), "PNG", pnginfo=texts, icc_profile=noise)
    with pytest.raises(ValueError, match="too large"):
        Image.open(io.BytesIO(data)).load()  # what happens without care
    assert (read(data) == read(file_of(smooth(), "PNG"))).all()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    jpeg = file_of(smooth(), "JPEG", icc_profile=(profile + noise)[:1_500_000], comment=b"c" * 60_000)
    assert (read(jpeg) == read(file_of(smooth(), "JPEG"))).all()


def test_transparency_is_laid_on_the_background():  # fault C 26
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    half.putpixel((0, 0), (9, 9, 9, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 255, 0, 0])
    palette.putpixel((0, 0), 0)
    for data, red in ((file_of(half, "PNG"), 127), (file_of(palette, "PNG", transparency=0), 0)):
        assert header(data).transparent
        assert read(data)[0, 0].tolist() == [255, 255, 255] and read(data)[1, 1, 0] == 255
        assert abs(read(data)[1, 1, 1] - red) <= 1
        assert read(data, background=(0, 0, 0))[0, 0].tolist() == [0, 0, 0]
    grey = Image.new("LA", (4, 4), (0, 64))
    assert read(file_of(grey, "PNG"))[0, 0].tolist() == [191] * 3
    key = file_of(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert (read(key) == 255).all()
    deep = Image.new("I;16", (4, 4), 770)
    assert (read(file_of(deep, "PNG")) == 3).all()
    assert (read(file_of(palette, "GIF", transparency=0))[0, 0] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped():  # fault C 25
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.round(ramp / 257).astype(int)
    assert np.asarray(Image.fromarray(ramp).convert("RGB")).mean() > 250  # what happens without care
    for format in ("PNG", "TIFF"):
        assert (read(file_of(Image.fromarray(ramp), format))[:, :, 1] == expected).all()
    numbers = ramp.astype(np.int32)
    assert np.abs(read(file_of(Image.fromarray(numbers), "TIFF"))[:, :, 0] - expected).max() <= 1
    assert np.abs(read(file_of(Image.fromarray(numbers * 1000), "TIFF"))[:, :, 0] - expected).max() <= 1
    floats = (ramp / 65535).astype(np.float32)
    for scale in (1, 40):
        assert np.abs(read(file_of(Image.fromarray(floats * scale), "TIFF"))[:, :, 0] - expected).max() <= 1
    floats[0, 0] = np.nan
    with pytest.raises(ImageError, match="finite"):
        read(file_of(Image.fromarray(floats * np.inf), "TIFF"))
    rows = b"".join(b"\0" + bytes([9, 200]) * 3 * 4 for _ in range(4))  # 16 bits in RGB
    assert (read(png(4, 4, 16, 2, rows)) == 9).all()


def png(width, height, depth, kind, rows):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    packed = zlib.compress(rows, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_cmyk_and_adobe_s_inverted_cmyk_are_the_same_image():  # fault C 27
    cmyk = smooth().convert("CMYK")
    data = file_of(cmyk, "JPEG", quality=100)  # Pillow writes it inverted, with Adobe's mark
    assert b"Adobe" in data[:200] and header(data).mode == "CMYK"
    assert np.abs(read(data) - np.asarray(smooth()).astype(int)).max() < 12
    plain = file_of(cmyk, "TIFF")
    assert np.abs(read(data) - read(plain)).max() < 12


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken_and_noted(format):  # fault C 29
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:])
    assert header(data).animated
    assert np.abs(read(data) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2)])
def test_tiny_and_narrow_images_are_read(size):  # fault C 30
    data = file_of(Image.new("RGB", size, "teal"), "PNG")
    for at_least in (None, 1, 512):
        assert read(data, at_least=at_least).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_large_images_come_out_smaller_but_never_below_twice_what_is_needed(format):
    big = smooth((1200, 900))
    image = read_image(io.BytesIO(file_of(big, format)), at_least=100)
    assert 200 <= min(image.size) < 460 and abs(image.width / image.height - 4 / 3) < 0.01
    reference = np.asarray(big.resize(image.size, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - reference).mean() < 2


BAD = {  # name -> (bytes, reason, detail)
    "cut png": (file_of(smooth(), "PNG")[:-60], "is damaged or cut short", ""),
    "cut jpeg": (file_of(smooth(), "JPEG")[:700], "is damaged or cut short", "truncated"),
    "cut webp": (file_of(smooth(), "WEBP")[:150], "is damaged or cut short", ""),
    "empty": (b"", "is empty", "0 bytes"),
    "text": (b"hello, I am no image\n", "is no image", "text"),
    "html": (b"\n<!DOCTYPE html><html>404", "is no image", "HTML"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is no image", "SVG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "is of a kind that is not read", "HEIC"),
    "pdf": (b"%PDF-1.7\n", "is of a kind that is not read", "PDF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is of a kind that is not read", "git-lfs"),
    "bomb": (png(60_000, 60_000, 8, 2, b""), "is too large an image", "bomb"),
    "warned": (png(10_000, 10_000, 8, 2, b""), "is too large an image", "64 megapixels"),
    "zero wide": (png(0, 10, 8, 2, b""), "is ", ""),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line_with_a_reason(name):  # faults C 22-24
    data, reason, detail = BAD[name]
    with pytest.raises(ImageError) as error:
        read_image(io.BytesIO(data), f"folder/{name}.jpg")
    assert str(error.value).startswith(f"folder/{name}.jpg: {reason}") and detail in str(error.value)
    assert "object at 0x" not in str(error.value)


def test_bombs_are_refused_from_the_header(tmp_path):  # fault C 24
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    rows = zlib.compress(bytes(10_001 * 10_000), 1)
    for side in (10_000, 60_000):
        bomb = png(side, side, 8, 0, b"").replace(zlib.compress(b"", 1), rows)
        with pytest.raises(ImageError, match="too large"):
            header(bomb)
        with pytest.raises(ImageError, match="too large"):
            read(bomb, at_least=64)
    with (tmp_path / "sparse.bmp").open("wb") as file:
        file.write(b"BM")
        os.truncate(file.name, MAX_FILE + 1)
    with (tmp_path / "sparse.bmp").open("rb") as file, pytest.raises(ImageError, match="file is too large"):
        read_header(file)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_the_largest_images_that_are_read_stay_within_memory(tmp_path):
    """In a process of its own, since it is the peak that counts: 40 megapixels of transparent PNG."""
    import subprocess
    import sys

    side = 6300
    path = tmp_path / "large.png"
    path.write_bytes(png(side, side, 8, 6, (b"\0" + bytes(4 * side)) * side))
    code = f"""
import resource
from ldm.data.images import read_image
from PIL import Image; Image.init()
import numpy
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
image = read_image(open({str(path)!r}, "rb"), at_least=512)
assert image.getpixel((5, 5)) == (255, 255, 255)
print(min(image.size), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size == 1050 and grown < 200
