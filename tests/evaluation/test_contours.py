"""Whether images follow the contours of scenes: exact ones, moved ones, others; and a model's own ControlNet."""

import json
import shutil

import numpy as np
import torch
from PIL import Image

import ldm
from ldm.checkpoint import load_model
from ldm.checkpoint.controlnet import save_controlnet
from ldm.cli import main
from ldm.control import condition_of
from ldm.evaluation import open_list, real_images
from ldm.evaluation.contours import contours, object_mask
from ldm.nn.controlnet import ControlNet


def test_contours_are_those_of_the_scene():
    prompts = open_list("everyday-30")[1][:8]
    scenes = real_images(prompts, range(1, 9))
    exact = contours(scenes, scenes)
    assert exact["followed"] == exact["n"] == 8 and exact["mean"] == 1 and exact["others"] < 0.75
    moved = contours([np.roll(scene, 12, axis=1) for scene in scenes], scenes)
    assert moved["followed"] < 4 and 0.4 < moved["mean"] < 0.85
    again = contours([Image.fromarray(255 - scene) for scene in scenes], scenes)  # other colours, the same contours
    assert again["mean"] > 0.9


def test_what_an_object_encloses_belongs_to_it():
    image = np.full((128, 128, 3), 250, np.uint8)
    image[30:90, 20:100] = (200, 30, 30)
    image[40:60, 40:60] = 250  # a hole with the background's colour
    mask = object_mask(image)
    assert mask[30:90, 20:100].all() and mask.sum() == 60 * 80


def test_a_models_own_control_draws_and_is_judged(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    scene = real_images(open_list("everyday-30")[1][:1], [1])[0]
    Image.fromarray(scene).save(tmp_path / "drawing.png")
    draw = ["generate", "a cat", "--model", str(folder), "--control", f"edges:{tmp_path}/drawing.png", "--seed", "1"]
    draw += ["--steps", "2", "--width", "64", "--height", "64", "-o"]
    assert main([*draw, str(tmp_path / "a.png")]) == 2
    assert "has no control 'edges' of its own" in capsys.readouterr().err
    model = load_model(folder)
    net = ControlNet.from_unet(model.unet, 8, 4, (32, 32), (4, 4, 8, 8))
    for layer in (net.controlnet_mid_block, *net.controlnet_down_blocks, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(layer.weight, std=0.5)
    save_controlnet(net, folder / "controlnets" / "edges", torch.bfloat16)
    assert main([*draw, str(tmp_path / "a.png")]) == 0
    given = ["--controlnet", str(folder / "controlnets" / "edges")]
    words = [word.replace("edges:", "") for word in draw]
    words[words.index("--control")] = "--control-image"
    condition_of("edges", Image.open(tmp_path / "drawing.png").resize((64, 64), Image.Resampling.LANCZOS)).save(
        tmp_path / "drawing.png"
    )
    assert main([*words, str(tmp_path / "b.png"), *given]) == 0
    pixels = [np.asarray(Image.open(tmp_path / name), int) for name in ("a.png", "b.png")]
    assert np.array_equal(*pixels)
    report = ldm.evaluate(folder, "everyday-30", tmp_path / "scores", n=2, control="edges", num_inference_steps=1)
    assert report["contours"]["n"] == 2 and "contours: " in capsys.readouterr().out
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["contours"] == report["contours"]
    assert main(["evaluate", str(folder), "--controlnet", "x"]) == 2
    assert "needs --control KIND" in capsys.readouterr().err
