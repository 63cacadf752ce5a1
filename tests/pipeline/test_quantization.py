"""Flow transformers with blocks in 8 bits: refused in one line, or near the image of 16 bits in half the memory."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm import Pipeline, device, render
from ldm.checkpoint import clear_cache, load_model
from ldm.checkpoint.memory import memory_of, weight_shapes
from ldm.cli import main
from ldm.errors import ConfigError
from ldm.nn.quantization import stored_bytes
from ldm.render.replay.replay import keywords, read_replays
from tests.flow_models import SIDE, build

FEW = {"num_inference_steps": 3, "seed": 3, "height": SIDE, "width": SIDE}
PLACE = {"device": "cpu", "dtype": "bf16"}
HERE = importlib.util.find_spec("torchao") is not None
installed = pytest.mark.skipif(not HERE, reason="torchao is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eight") / "flux"
    build("flux_dev").save_pretrained(root)
    return root


@pytest.fixture
def as_installed(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: SimpleNamespace(name=name))


def test_without_torchao_it_is_refused_in_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    words = ["--quantization", "int8", "-o", str(tmp_path / "cat.png")]
    assert main(["generate", "a cat", "--model", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert "torchao is not installed" in error and "ldm-pipeline[int8]" in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="expected int8, got 'int4'"):
        Pipeline("a cat", folder, quantization="int4")
    with pytest.raises(ConfigError, match="is for SD3 and FLUX"):  # nothing is to be installed for a U-Net
        Pipeline("a cat", "default", quantization="int8")
    lines = ["a cat", {"prompt": "a dog", "quantization": "int4"}]
    out = render(lines, tmp_path / "out", model="default", steps=1, dry_run=True)
    assert out.counts["bad_lines"] == 1


def test_what_has_no_blocks_or_is_merged_is_refused(folder, tmp_path, as_installed):
    words = {"quantization": "int8", **PLACE}
    with pytest.raises(ConfigError, match="quantization: is for SD3 and FLUX"):
        Pipeline("a cat", "default", **words)
    with pytest.raises(ConfigError, match="a loaded model has its weights"):
        Pipeline("a cat", load_model(folder, "cpu", "bf16"), quantization="int8")
    with pytest.raises(ConfigError, match="quantization: is for SD3 and FLUX"):
        load_model("default", "cpu", "fp32", quantization="int8", cache=False)
    name = "transformer.transformer_blocks.0.attn.to_q"
    update = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    save_file(update, tmp_path / "l.safetensors")
    with pytest.raises(ConfigError, match="LoRAs are merged"):
        Pipeline("a cat", folder, lora=tmp_path / "l.safetensors", **words)
    with pytest.raises(ConfigError, match="cannot be saved"):
        Pipeline("a cat", folder, **words).save(tmp_path / "saved")


def test_the_plan_counts_one_byte_a_number_and_what_a_row_needs():
    shapes = {"transformer_blocks.0.attn.to_q.weight": (8, 6), "transformer_blocks.0.attn.to_q.bias": (8,)}
    shapes |= {"proj_out.weight": (4, 6)}
    found = memory_of({"transformer": shapes, "vae": {"a": (10,)}}, 2, "int8")
    assert found["block"] == 8 * 6 + 5 * 8 + 2 * 8 and found["around"] == 2 * 24
    assert found["parts"]["transformer"] == found["block"] + found["around"] == found["device"]["offload"]


@installed
def test_an_image_is_near_that_of_16_bits_in_half_the_memory(folder, capsys):
    exact = np.asarray(Pipeline("a cat", folder, device="cpu", dtype="fp32").generate(**FEW)[0], dtype=float)
    half = np.asarray(Pipeline("a cat", folder, **PLACE).generate(**FEW)[0], dtype=float)
    found = Pipeline("a cat", folder, quantization="int8", **PLACE).generate(**FEW, num_images=3)
    eight = np.asarray(found[0], dtype=float)
    assert found.metadata[0]["quantization"] == "int8"
    errors = [np.abs(one - exact).mean() for one in (half, eight)]
    print(f"mean error of 255: bf16 {errors[0]:.3f}, int8 {errors[1]:.3f}")
    assert 0 < errors[1] < 4 * errors[0] + 1
    alone = Pipeline("a cat", folder, quantization="int8", **PLACE).generate(**{**FEW, "seed": 5})
    assert alone[0].tobytes() == found[2].tobytes()
    lent = Pipeline("a cat", folder, quantization="int8", offload="blocks", **PLACE).generate(**FEW)
    assert lent[0].tobytes() == found[0].tobytes() and "weights in bf16 and int8" in capsys.readouterr().err
    unet = load_model(folder, "cpu", "bf16", quantization="int8").unet
    planned = memory_of(weight_shapes(folder), 2, "int8")["parts"]["transformer"]
    assert sum(map(stored_bytes, (*unet.parameters(), *unet.buffers()))) == planned
    assert planned < 0.7 * memory_of(weight_shapes(folder))["parts"]["transformer"]  # at a width of 32


@installed
def test_an_image_is_drawn_again_in_8_bits(folder, tmp_path):
    found = Pipeline("a cat", folder, quantization="int8", **PLACE).generate(**FEW)
    found.save(tmp_path / "cat.png")
    own, call = keywords(next(read_replays([tmp_path / "cat.png"])))
    clear_cache()
    again = Pipeline(**{**own, "model": folder}).generate(**call)
    assert own["quantization"] == "int8" and again[0].tobytes() == found[0].tobytes()
    out = render(None, tmp_path / "out", sources=[tmp_path / "cat.png"], model=str(folder), device="cpu")
    assert out.paths[0].read_bytes() and out.counts["rendered"] == 1
