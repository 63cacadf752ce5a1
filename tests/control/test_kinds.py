"""Conditions: closed forms on drawn shapes, sizes, and the command."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldm.cli import main
from ldm.control import ALIASES, KINDS, condition_of, edges
from ldm.errors import ConfigError


def shape(draw="ellipse", size=(96, 80), box=(20, 16, 70, 60), fill="black", ground="white"):
    image = Image.new("RGB", size, ground)
    getattr(ImageDraw.Draw(image), draw)(box, fill=fill)
    return image


def white(image):
    return np.asarray(image.convert("L")) > 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (64, 48)])
def test_every_kind_keeps_the_size_and_gives_the_same_bits(kind, size):
    noise = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    first, again = (condition_of(kind, Image.fromarray(noise)) for _ in range(2))
    assert first.size == size and first.mode == "RGB" and first.tobytes() == again.tobytes()


def test_an_edge_is_one_pixel_wide_and_where_the_colour_changes():
    found = white(edges(shape("rectangle")))
    across = np.flatnonzero(found[40])
    assert len(across) == 2 and abs(across[0] - 20) <= 1 and abs(across[1] - 70) <= 1
    assert np.flatnonzero(found[:, 45]).tolist()[0] in (15, 16) and not found[30:50, 30:60].any()
    assert not white(edges(Image.new("RGB", (40, 40), "red"))).any()


def test_weak_edges_are_kept_where_they_touch_strong_ones():
    image = np.full((40, 60), 128, np.uint8)
    image[20:, :30] = 20  # strong, and from there on
    image[20:, 30:] = 95  # weak
    found = white(edges(Image.fromarray(image).convert("RGB")))
    assert found[19:21, 2:58].any(axis=0).all()
    image[20:, :30] = 128  # without the strong part
    image[20:, 30:] = 103
    assert not white(edges(Image.fromarray(image).convert("RGB"))).any()


def test_segmentation_names_flat_regions_by_rank():
    image = shape(fill=(200, 30, 40), ground=(240, 240, 250))
    ImageDraw.Draw(image).rectangle((75, 65, 90, 75), fill=(10, 120, 30))
    regions = np.asarray(condition_of("segmentation", image))
    assert regions[2, 2].tolist() == [0, 0, 0] and regions[40, 45].tolist() == [230, 60, 60]
    assert len({tuple(pixel) for pixel in regions.reshape(-1, 3).tolist()}) == 3
    other = np.asarray(condition_of("segmentation", shape(fill=(9, 9, 120), ground=(200, 180, 90))))
    assert other[40, 45].tolist() == [230, 60, 60]  # whatever its colour


def test_lines_palettes_and_blurs():
    stroke = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(stroke).line((10, 64, 118, 64), fill="black", width=2)
    found = np.asarray(condition_of("lineart", stroke).convert("L"))
    assert (found[64, 20:100] > 80).all() and found[:50].max() == 0
    squares = np.asarray(condition_of("palette", shape(size=(128, 128))))
    assert len(np.unique(squares.reshape(-1, 3), axis=0)) <= 64 and (squares[:16, :16] == squares[0, 0]).all()
    soft = np.asarray(condition_of("soft-edges", shape()).convert("L"))
    assert soft[40, 19:22].max() > 200 and soft[40, 45] == 0
    assert set(ALIASES.values()) <= set(KINDS)


def test_the_command(tmp_path, capsys):
    shape().save(tmp_path / "photo.png")
    words = ["preprocess", "canny", str(tmp_path / "photo.png"), "-o", str(tmp_path / "edges.png"), "--size", "48x40"]
    assert main(words) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "edges.png")
    assert Image.open(tmp_path / "edges.png").size == (48, 40)
    for wrong in (["preprocess", "edge", *words[2:]], [*words[:2], "none.png", *words[3:]], [*words[:4], "x.gif"]):
        assert main(wrong) == 2 and "\n" not in capsys.readouterr().err.strip()
    with pytest.raises(ConfigError, match="did you mean 'edges'"):
        condition_of("edgse", shape())
