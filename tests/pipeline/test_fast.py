"""`fast=True`: the shipped few-step LoRA, and what is said where it cannot be."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline, render
from ldm.checkpoint import folder
from ldm.checkpoint.describe import describe
from ldm.checkpoint.few_steps import KEY, MODEL_KEY
from ldm.checkpoint.lora.read import FILE
from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from ldm.images import read_metadata

SAMPLING = json.dumps({"kind": "few-step", "sampler": "ddim", "spacing": "trailing", "num_inference_steps": 2})


@pytest.fixture
def shipped(tiny_folder, tmp_path, monkeypatch):
    """An installation whose default model is the tiny one, without a few-step LoRA; a function that writes LoRAs."""
    shutil.copytree(tiny_folder, tmp_path / "weights/default")
    monkeypatch.setattr(folder, "PACKAGE", tmp_path / "ldm")

    def write(path, layer="mid_block.attentions.0.proj_in", width=64, **metadata):
        path.parent.mkdir(parents=True, exist_ok=True)
        g = torch.Generator().manual_seed(0)
        tensors = {f"unet.{layer}.lora_A.weight": torch.randn(2, width, 1, 1, generator=g)}
        tensors[f"unet.{layer}.lora_B.weight"] = torch.randn(64, 2, 1, 1, generator=g)
        save_file(tensors, path, metadata or None)
        return path

    write.place = tmp_path / "weights/fast" / FILE
    return write


def test_it_draws_with_the_shipped_file_and_its_settings(shipped, tmp_path, capsys):
    header = {KEY: SAMPLING, MODEL_KEY: describe("default", hashed=True).hash}
    shipped(shipped.place, **header)
    assert main(["generate", "a cat", "--fast", "--seed", "1", "-o", str(tmp_path / "a.png")]) == 0
    record = read_metadata(tmp_path / "a.png").ldm
    assert (record["sampler"], record["num_inference_steps"], record["few_steps"]) == ("ddim", 2, "few-step")
    fast = Pipeline("a cat", fast=True).generate(seed=1)
    by_hand = Pipeline("a cat", lora=shipped.place).generate(seed=1)
    plain = Pipeline("a cat").generate(seed=1, sampler="ddim", steps=2, guidance_scale=1)
    assert fast[0].tobytes() == by_hand[0].tobytes() != plain[0].tobytes()
    style = shipped(tmp_path / "style.safetensors")
    assert len(Pipeline("a cat", fast=True, lora=style).generate(seed=1).metadata[0]["lora"]) == 2
    assert Pipeline("a cat", fast=True).generate(seed=1, steps=3).metadata[0]["num_inference_steps"] == 3  # given


def test_what_cannot_be_is_one_line(shipped, tiny_folder, tmp_path, capsys):
    with pytest.raises(ModelError, match=r"no few-step LoRA for the default model.*ldm distill"):
        Pipeline("a cat", fast=True)
    assert main(["generate", "a cat", "--fast", "-o", str(tmp_path / "a.png")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ConfigError, match="fast: is for the default model, and the model is tiny"):
        Pipeline("a cat", tiny_folder, fast=True)
    shipped(shipped.place, **{KEY: SAMPLING, MODEL_KEY: "0" * 64})
    with pytest.raises(ModelError, match="distilled from another default model"):
        Pipeline("a cat", fast=True)
    shipped(shipped.place, width=8, **{KEY: SAMPLING})
    with pytest.raises(ModelError, match=FILE):  # does not fit the default model
        Pipeline("a cat", fast=True)
    shipped(shipped.place, **{KEY: SAMPLING})
    other = shipped(tmp_path / "lcm.safetensors", **{KEY: SAMPLING})
    with pytest.raises(ConfigError, match=r"fast: lcm\.safetensors is a few-step LoRA itself"):
        Pipeline(["a dog", "a cat <lora:lcm>"], fast=True, lora_dir=other.parent)
    wide = shipped(tmp_path / "wide.safetensors", width=8)
    with pytest.raises(ModelError, match=r"wide\.safetensors"):
        Pipeline("a cat", fast=True, lora=wide)
    with pytest.raises(ConfigError, match="expected True or False"):
        Pipeline("a cat", fast="yes")


def test_a_prompt_file_is_drawn_with_it_too(shipped, tiny_folder, tmp_path, capsys):
    shipped(shipped.place, **{KEY: SAMPLING, MODEL_KEY: describe("default", hashed=True).hash})
    (tmp_path / "p.txt").write_text(f"a cat --d 1\na cat --d 1 --s 3\na cat --d 1 --model {tiny_folder}\n")
    assert main(["render", str(tmp_path / "p.txt"), "-o", str(tmp_path / "out"), "--fast"]) == 3
    assert "p.txt:3 (fast): is for the default model, and the model is" in capsys.readouterr().err
    drawn = [Image.open(path).convert("RGB").tobytes() for path in sorted((tmp_path / "out").glob("*.png"))]
    pipe = Pipeline("a cat", fast=True)
    assert drawn == [pipe.generate(seed=1, **more)[0].tobytes() for more in ({}, {"steps": 3})]
    own = shipped(tmp_path / "own.safetensors", **{KEY: SAMPLING})
    with pytest.raises(ConfigError, match=r"fast: own\.safetensors is a few-step LoRA itself"):
        render(["a cat"], tmp_path / "two", fast=True, lora=own)
