"""A U-Net as OpenVINO's code: as the plain one within rounding, with the same bits in every batch, and said."""

import copy
import importlib.util

import numpy as np
import pytest
import torch

from ldm import Pipeline, device, render
from ldm.bench.timing import OURS, PEER, measure
from ldm.bench.warm import warm_row
from ldm.cli import main
from ldm.errors import ConfigError
from ldm.nn.openvino import OpenVinoUNet
from ldm.nn.unet import UNet
from tests.nn.test_compiled import CONFIG, inputs

installed = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
FEW = {"num_inference_steps": 3, "seed": 3}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).eval()


@installed
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_it_agrees_and_gives_the_same_bits_in_any_batch(unet, dtype, limit, capsys):
    unet = unet.to(dtype)
    x, t, states = inputs(7)
    x, states = x.to(dtype), states.to(dtype)
    code = OpenVinoUNet(copy.deepcopy(unet).to(memory_format=torch.channels_last))  # as wide U-Nets are kept
    whole = code(x, t, states)
    with torch.no_grad():
        plain = unet(x, t, states)
    assert whole.dtype == dtype and plain.std() > 0.1
    assert (whole - plain).abs().max() < limit * plain.abs().max()
    for rows in (1, 2, 4, 5):
        assert torch.equal(code(x[:rows], t[:rows], states[:rows]), whole[:rows]), rows
    assert torch.equal(code(x[1:3], t[1:3], states[1:3]), whole[1:3])
    assert capsys.readouterr().err.count("compiling the network for latents of 8x8: OpenVINO") == 1


@installed
def test_masks_and_perturbed_blocks_have_code_of_their_own(unet):
    unet, code = unet.float(), OpenVinoUNet(unet.float())
    x, t, states = inputs(2)
    mask = torch.arange(5).expand(2, 5) < torch.tensor([[2], [5]])
    perturbed = {"perturb": torch.tensor([False, True]), "perturb_in": ("mid",)}
    for more in ({"mask": mask}, perturbed):
        with torch.no_grad():
            plain = unet(x, t, states, **more)
        assert (code(x, t, states, **more) - plain).abs().max() < 1e-5 * plain.abs().max()
    assert not torch.equal(code(x, t, states, mask=mask), code(x, t, states))


@installed
def test_an_image_is_nearly_the_same_and_says_so(tiny_folder, tmp_path, capsys):
    plain = Pipeline("a cat", tiny_folder, device="cpu", dtype="fp32").generate(**FEW, num_images=3)
    pipe = Pipeline("a cat", tiny_folder, device="cpu", dtype="fp32", backend="openvino")
    images = pipe.generate(**FEW, num_images=3)
    for ours, theirs in zip(plain, images):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1
    again = pipe.generate(num_inference_steps=3, seed=5)[0]
    assert (np.asarray(again) == np.asarray(images[2])).all()
    assert images.metadata[0]["backend"] == "openvino" and "openvino" in images.metadata[0]["versions"]
    assert "backend" not in plain.metadata[0]
    out = render(["a cat"], tmp_path / "out", model=str(tiny_folder), steps=3, dtype="fp32", backend="openvino")
    assert out.counts["rendered"] == 1
    assert (
        main(["render", "--from", str(out.paths[0]), "-o", str(tmp_path / "again"), "--model", str(tiny_folder)]) == 0
    )
    assert "backend was openvino, is torch: the last bits may differ" in capsys.readouterr().err


def test_it_is_refused_in_one_line_where_it_cannot_be(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert main(["generate", "a cat", "--backend", "openvino", "-o", str(tmp_path / "cat.png")]) == 2
    error = capsys.readouterr().err
    assert "openvino is not installed" in error and "ldm-pipeline[openvino]" in error and error.count("\n") == 1
    with pytest.raises(ConfigError, match="openvino is for CPUs, not for meta"):
        device.check_unet_backend("openvino", torch.device("meta"))
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="openvino compiles the network itself: leave compile out"):
        Pipeline("a cat", tiny_folder, device="cpu", compile=True, backend="openvino")
    with pytest.raises(ConfigError, match="step_cache: compiled code computes all: leave backend out"):
        Pipeline("a cat", tiny_folder, device="cpu", backend="openvino").generate(step_cache=2, **FEW)


@installed
def test_bench_measures_it():
    row = warm_row(steps=2, backend="openvino", quick=True)
    assert row.settings["backend"] == "openvino"
    found = measure(row, 1)
    assert set(found.seconds) == {OURS, PEER} and found.agreement["diffusers: difference of 255"] <= 2
