"""Depth and normals by a transformers model of random weights, and poses from keypoints."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.cli import main
from ldm.control.depth import depth_image, depth_of, normal_image
from ldm.control.pose import COLOURS, draw_poses, read_poses
from ldm.errors import LdmError


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory):
    import transformers

    backbone = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.DepthAnythingConfig(
        backbone_config=transformers.Dinov2Config(**backbone, out_indices=[1, 2], reshape_hidden_states=False),
        reassemble_hidden_size=16,
        reassemble_factors=[2, 1],
        neck_hidden_sizes=[8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "depth"
    transformers.DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    settings = {"image_processor_type": "DPTImageProcessor", "size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def photo(size=(60, 44)):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def test_depth_fills_its_range_in_the_image_size(depth_model, tmp_path, capsys):
    depth = depth_of(photo(), depth_model)
    assert depth.shape == (44, 60) and depth.min() == 0 and depth.max() == 1
    assert np.abs(depth - depth_of(photo().rotate(180), depth_model)).max() > 0.01
    photo().save(tmp_path / "photo.png")
    words = [str(tmp_path / "photo.png"), "-o", str(tmp_path / "made.png")]
    assert main(["preprocess", "depth", *words, "--depth-model", str(depth_model)]) == 0
    assert Image.open(tmp_path / "made.png").tobytes() == depth_image(depth).tobytes()
    capsys.readouterr()
    for wrong in (
        ["depth", *words],
        ["edges", *words, "--depth-model", "x"],
        ["normals", *words, "--depth-model", "x"],
        ["normal", *words],
        ["dpeth", *words],
    ):
        assert main(["preprocess", *wrong]) == 2
        said = capsys.readouterr().err.strip()
        assert len(said.splitlines()) == 1
    assert "did you mean 'depth'" in said


def test_normals_of_a_plane_and_of_a_slope():
    assert np.asarray(normal_image(np.full((32, 32), 0.5)))[3, 4].tolist() == [128, 128, 255]
    slope = np.tile(np.linspace(0, 1, 32), (32, 1))  # nearer to the right: its normal points to the left
    left, _, front = np.asarray(normal_image(slope))[16, 16].astype(int) - 128
    assert left < -2 and front > 100
    assert np.asarray(normal_image(slope.T))[16, 16][1] > 130  # nearer at the bottom: it points up


def keypoints(scale=1.0):
    points = np.array([[256 + 20 * (i % 5), 40 + 24 * i] for i in range(18)], float) * scale
    return [number for x, y in points for number in (x, y, 1.0)]


def test_poses_are_drawn_in_openpose_colours(tmp_path, capsys):
    file = tmp_path / "pose.json"
    person = keypoints()
    person[3 * 17 + 2] = 0.0  # an ear that is not seen
    file.write_text(json.dumps({"people": [{"pose_keypoints_2d": person}], "canvas_width": 512, "canvas_height": 600}))
    people, size = read_poses(file)
    image = draw_poses(people, size)
    assert size == (512, 600) and image.size == size and people[0][17] is None
    for i in range(17):
        assert image.getpixel((256 + 20 * (i % 5), 40 + 24 * i)) == COLOURS[i]
    assert COLOURS[17] not in {colour for _, colour in image.getcolors(1 << 20)}
    assert main(["preprocess", "pose", str(file), "-o", str(tmp_path / "pose.png"), "--size", "256x300"]) == 0
    assert Image.open(tmp_path / "pose.png").getpixel((128, 20)) == COLOURS[0]
    capsys.readouterr()
    file.write_text(json.dumps([{"people": [{"pose_keypoints_2d": keypoints(1 / 600)}]}]))
    assert np.allclose(read_poses(file)[0][0][0], (256 / 600, 40 / 600)) and read_poses(file)[1] == (512, 512)
    outside = keypoints(1 / 500)
    outside[3 * 16 + 1] = 1.04  # of a person at the border: still no pixels
    other = {"pose_keypoints_2d": keypoints(1 / 600)}
    file.write_text(json.dumps({"people": [{"pose_keypoints_2d": outside}, other]}))
    (near, _), _ = read_poses(file)
    assert np.allclose(near[0], (256 / 500, 40 / 500)) and near[16][1] == 1.04
    for bad in ("{", "{}", '{"people": [{"pose_keypoints_2d": [1, 2]}]}', '{"people": [{}], "canvas_width": "x"}'):
        file.write_text(bad)
        with pytest.raises(LdmError):
            read_poses(file)
        assert main(["preprocess", "pose", str(file), "-o", str(tmp_path / "x.png")]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
