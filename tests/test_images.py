"""Pictures to tensors and back, grids, and metadata that survives every file format."""

import json

import pytest
import torch
from PIL import Image

from ldm import images
from ldm.errors import ConfigError, DataError, NumericsError
from ldm.images import Metadata

TEXT = 'a cät, 🐱 "quoted"\nNegative prompt: dög\nSteps: 3, Sampler: Euler, CFG scale: 2.0, Seed: 7'


def gradient(width=16, height=8):
    return Image.merge("RGB", [Image.linear_gradient("L").resize((width, height))] * 3)


def test_tensor_and_back_is_the_same_picture():
    picture = Image.frombytes("RGB", (16, 16), bytes(range(256)) * 3)
    tensor = images.to_tensor([picture, picture])
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.min() == -1 and tensor.max() == 1
    assert [p.tobytes() for p in images.to_pil(tensor)] == [picture.tobytes()] * 2


def test_values_outside_the_range_are_clipped_and_nan_is_an_error():
    high = torch.full((1, 3, 2, 2), 3.0)
    assert images.to_pil(high)[0].getpixel((0, 0)) == (255, 255, 255)
    for bad in (float("nan"), float("inf")):
        high[0, 1, 1, 1] = bad
        with pytest.raises(NumericsError):
            images.to_pil(high)


def test_transparency_is_laid_on_white_and_16_bit_grey_is_scaled():
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert images.flatten(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = clear.convert("RGB").convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert images.flatten(palette).getpixel((0, 0)) == (255, 255, 255)
    assert images.flatten(Image.new("I;16", (4, 4), 32896)).getpixel((0, 0)) == (128, 128, 128)
    assert images.flatten(Image.new("L", (4, 4), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_pictures_of_two_sizes_make_no_tensor():
    with pytest.raises(DataError, match="8x8, 16x8"):
        images.to_tensor([gradient(), gradient(8, 8)])


def test_grid_places_row_by_row():
    colours = ["red", "blue", "lime", "black", "yellow"]
    sheet = images.grid([Image.new("RGB", (4, 2), c) for c in colours])
    assert sheet.size == (12, 4)
    assert sheet.getpixel((4, 0)) == (0, 0, 255) and sheet.getpixel((0, 2)) == (0, 0, 0)
    assert sheet.getpixel((11, 3)) == (255, 255, 255)
    assert images.grid([gradient(4, 4)] * 3, columns=3, gap=2).size == (16, 4)
    with pytest.raises(DataError):
        images.grid([])
    with pytest.raises(ConfigError):
        images.grid([gradient()], columns=0)


@pytest.mark.parametrize("format", images.FORMATS)
def test_metadata_survives_the_file(format, tmp_path):
    metadata = Metadata(TEXT, {"prompt": "a cät 🐱", "seed": 2**40, "guidance_scale": 6.5, "list": [1, None]})
    path = tmp_path / f"x.{format}"
    path.write_bytes(images.encode(gradient(), format, metadata))
    assert images.read_metadata(path) == metadata
    with Image.open(path) as image:
        assert image.format == images.FORMATS[format] and image.size == (16, 8)
    path.write_bytes(images.encode(gradient(), format))
    assert images.read_metadata(path) == Metadata()


def test_png_chunks_are_the_ones_other_tools_read(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(images.encode(gradient(), "png", Metadata(TEXT, {"seed": 7})))
    with Image.open(path) as image:
        assert image.text["parameters"] == TEXT
        assert json.loads(image.text["ldm"]) == {"seed": 7}


@pytest.mark.parametrize("order", ["utf-16-be", "utf-16-le"])
def test_user_comment_of_other_tools_is_read_in_either_byte_order(order, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(images.EXIF_IFD)[images.USER_COMMENT] = b"UNICODE\0" + "a cat\nSteps: 20".encode(order)
    gradient().save(tmp_path / "x.jpg", exif=exif.tobytes())
    assert images.read_metadata(tmp_path / "x.jpg") == Metadata("a cat\nSteps: 20")


def test_jpeg_keeps_what_fits_and_says_what_does_not(capsys, tmp_path):
    path = tmp_path / "x.jpg"
    path.write_bytes(images.encode(gradient(), "jpg", Metadata("short", {"prompt": "x" * 70_000})))
    assert images.read_metadata(path) == Metadata("short")
    assert "the ldm metadata is left out" in capsys.readouterr().err
    path.write_bytes(images.encode(gradient(), "jpg", Metadata("y" * 40_000, {"prompt": "x"})))
    assert images.read_metadata(path) == Metadata()
    assert "all metadata is left out" in capsys.readouterr().err
    path.write_bytes(images.encode(gradient(), "webp", Metadata("y" * 40_000)))
    assert images.read_metadata(path).parameters == "y" * 40_000


def test_files_that_are_no_pictures_are_named(tmp_path):
    whole = images.encode(gradient(64, 64), "png", Metadata(TEXT))
    for name, data in {"empty.png": b"", "text.png": b"<html>", "cut.png": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=name):
            images.read_metadata(tmp_path / name)
    with pytest.raises(DataError, match="missing"):
        images.read_metadata(tmp_path / "missing.png")


def test_format_names():
    assert [images.file_format(n) for n in ("PNG", ".jpeg", "jpg", ".WebP")] == ["png", "jpg", "jpg", "webp"]
    with pytest.raises(ConfigError, match="did you mean 'webp'"):
        images.file_format("wepb")
