"""T2I-Adapters by --controlnet: features and images equal diffusers', with negative controls; batches, bad input."""

import dataclasses
import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.checkpoint.controlnet import save_controlnet
from ldm.checkpoint.controls import find_control
from ldm.checkpoint.t2i_adapter import is_t2i_adapter, t2i_config, t2i_names
from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from ldm.nn.t2i_adapter import T2IAdapter, config_of
from ldm.nn.unet_config import UNetConfig
from ldm.pipeline import Pipeline
from ldm.render.drawing.runner import render
from tests.conftest import build_tiny_model
from tests.nn.test_unet import FIXTURES
from tests.pipeline.test_control import SIZE, STEPS, apart, drawing, loud


def loud_adapter(seed=0, **settings):
    """diffusers' adapter of random weights that move pixels."""
    from diffusers import T2IAdapter as Peer

    torch.manual_seed(seed)
    net = Peer(**{"channels": [32, 64], "num_res_blocks": 1, **settings}).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def original(state, layers=1):
    """An adapter's tensors under TencentARC's names, as A1111 and ComfyUI have them in single files."""
    found = {}
    for name, tensor in state.items():
        plain = name.removeprefix("adapter.")
        if not any(".out_conv." in other for other in state):  # a level's layers are counted on
            plain = re.sub(r"body\.(\d+)\.resnets\.(\d+)", lambda m: f"body.{int(m[1]) * layers + int(m[2])}", plain)
            plain = re.sub(r"body\.(\d+)\.in_conv", lambda m: f"body.{int(m[1]) * layers}.in_conv", plain)
        found[plain.replace(".resnets.", ".body.")] = tensor.contiguous()
    return found


@pytest.fixture(scope="module")
def model():
    return build_tiny_model()


@pytest.fixture(scope="module")
def nets(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2i")
    loud_adapter(1).save_pretrained(folder / "a")
    loud_adapter(2, in_channels=1, num_res_blocks=2).save_pretrained(folder / "grey")
    save_controlnet(loud(model.unet), folder / "net", torch.float32)
    return folder


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
def test_features_equal_diffusers(kind):
    theirs = loud_adapter(adapter_type=kind, channels=[8, 16, 16], num_res_blocks=2, downscale_factor=4)
    ours = T2IAdapter(config_of(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    image = torch.rand(1, 3, 36, 20)  # of odd sizes below
    with torch.no_grad():
        mine, expected = ours(image), theirs(image)
    assert len(mine) == len(expected) and all(map(torch.equal, mine, expected))
    shapes = [(one.shape[1], 64 // one.shape[2]) for one in ours(torch.rand(1, 3, 64, 64))]
    assert shapes == ours.config.features


@pytest.mark.parametrize("kind", FIXTURES.T2I_ADAPTERS)
def test_names_and_shapes_at_full_width(kind):
    with torch.device("meta"):
        state = T2IAdapter(config_of(FIXTURES.T2I_ADAPTERS[kind])).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == FIXTURES.read(kind)


@pytest.fixture(scope="module")
def peer_parts(tiny_folder):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    parts = dict(StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None).components)
    parts["scheduler"] = DDIMScheduler.from_pretrained(tiny_folder, subfolder="scheduler")
    return {name: part for name, part in parts.items() if name != "image_encoder"}


@pytest.mark.parametrize(("names", "scale"), [(["a"], 0.8), (["grey"], 1.0), (["a", "a"], [0.6, 0.4])])
def test_images_equal_diffusers(names, scale, peer_parts, nets, tiny_folder):
    from diffusers import StableDiffusionAdapterPipeline
    from diffusers import T2IAdapter as Peer

    images = [drawing(i) for i in range(len(names))]
    shown = [image.convert("L") if name == "grey" else image for name, image in zip(names, images)]
    adapters = [Peer.from_pretrained(nets / name) for name in names]
    one = len(names) == 1
    pipe = StableDiffusionAdapterPipeline(**peer_parts, adapter=adapters[0] if one else adapters)
    pipe.set_progress_bar_config(disable=True)
    call = {"generator": torch.Generator().manual_seed(7), "num_inference_steps": 4, "guidance_scale": 3.0}
    call |= {"adapter_conditioning_scale": scale, "image": shown[0] if one else shown}
    theirs = pipe("a red cat", negative_prompt="a dog", **SIZE, **call).images[0]
    pipe = Pipeline("a red cat", tiny_folder, negative_prompt="a dog", controlnet=[nets / name for name in names])
    call = {"seed": 7, "adapter_conditioning_scale": scale, **STEPS, **SIZE}
    assert apart(pipe.generate(control_image=images, **call)[0], theirs) <= 1
    assert apart(pipe.generate(control_image=[one.rotate(90) for one in images], **call)[0], theirs) > 5
    without = Pipeline("a red cat", tiny_folder, negative_prompt="a dog").generate(seed=7, **STEPS, **SIZE)[0]
    assert apart(without, theirs) > 5


@pytest.mark.parametrize("kind", ["a", "grey"])
def test_single_files_draw_as_the_folders_do(kind, model, nets, tmp_path):
    folder = nets / kind
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    call = {"seed": 1, "control_image": drawing(), **STEPS, **SIZE}
    expected = Pipeline("a cat", model, controlnet=folder).generate(**call)[0]
    names = original(state, 2 if kind == "grey" else 1)
    if kind == "grey":
        assert {"body.1.block1.weight", "body.2.in_conv.weight", "body.3.block2.bias"} <= names.keys()
    for one in (names, {f"adapter.{name}": tensor for name, tensor in names.items()}, state):
        save_file(one, tmp_path / "t2i.safetensors")
        mine = Pipeline("a cat", model, controlnet=tmp_path / "t2i.safetensors").generate(**call)[0]
        assert mine.tobytes() == expected.tobytes()
    assert apart(expected, Pipeline("a cat", model).generate(seed=1, **STEPS, **SIZE)[0]) > 5


def test_a_single_file_of_a_light_adapter(model, tmp_path):
    net = loud_adapter(3, adapter_type="light_adapter", channels=[32], num_res_blocks=3)
    save_file(original(net.state_dict()), tmp_path / "light.safetensors")
    unet = dataclasses.replace(model.unet.config, block_out_channels=(32, 32))
    file = find_control(tmp_path / "light.safetensors", types.SimpleNamespace(unet=unet, factor=8, name="narrow"))
    assert file.cell == 8
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        pairs = zip(file.load(torch.device("cpu"), torch.float32)(image), net(image), strict=True)
    assert all(torch.allclose(mine, expected, rtol=1e-4, atol=1e-4) for mine, expected in pairs)


@pytest.mark.parametrize("kind", FIXTURES.T2I_ADAPTERS)
def test_single_files_of_the_field_are_read_by_their_shapes(kind):
    settings, shapes = FIXTURES.T2I_ADAPTERS[kind], FIXTURES.read(kind)
    unet = UNetConfig.from_diffusers(FIXTURES.CONFIGS["xl" if kind.endswith("xl") else "sd15"])
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    single = {name: tuple(tensor.shape) for name, tensor in original(on_meta, 2).items()}
    if kind == "t2i_adapter_sd15":  # the keys of t2iadapter_canny_sd14v1
        assert len(single) == 38 and single["body.4.in_conv.weight"] == (1280, 640, 1, 1)
        assert single["body.7.block2.weight"] == (1280, 1280, 1, 1) and single["conv_in.weight"] == (320, 64, 3, 3)
    names = t2i_names(single, Path("one.safetensors"))
    assert is_t2i_adapter(single) and {names[key]: shape for key, shape in single.items()} == shapes
    info = types.SimpleNamespace(unet=unet, factor=8, name="base")
    assert t2i_config(shapes, info, Path("one.safetensors")) == config_of(settings)


def test_the_same_bits_in_any_batch_beside_a_controlnet(model, nets):
    images = [[drawing(i), drawing(i + 3)] for i in range(3)]
    pipe = Pipeline(["a cat", "a dog", "a red cat"], model, controlnet=[nets / "a", nets / "net"])
    call = {**STEPS, "controlnet_conditioning_scale": [1.0, 0.001], "guidance": "pag", "step_cache": 2}
    together = pipe.generate(seed=3, control_image=images, batch_size=3, **call)
    for prompt, row, drawn in zip(pipe.prompts, images, together):
        alone = Pipeline(prompt, model, controlnet=[nets / "a", nets / "net"]).generate(
            seed=3, control_image=row, **call
        )
        assert alone[0].tobytes() == drawn.tobytes()
    other = pipe.generate(seed=3, control_image=[[drawing(9), row[1]] for row in images], **call)
    assert min(apart(one, two) for one, two in zip(together, other)) > 5
    plain = Pipeline("a cat", model).generate(seed=3, **STEPS)[0]  # no hook is left in the shared U-Net
    assert plain.tobytes() == Pipeline("a cat", build_tiny_model()).generate(seed=3, **STEPS)[0].tobytes()


def test_a_part_of_the_steps_and_guess_mode(model, nets):
    pipe, call = (
        Pipeline("a cat", model, controlnet=nets / "a"),
        {"seed": 1, "control_image": drawing(), **STEPS, **SIZE},
    )
    whole = pipe.generate(**call)[0]
    first = pipe.generate(adapter_conditioning_factor=0.25, **call)[0]
    guess = pipe.generate(guess_mode=True, **call)[0]
    plain = Pipeline("a cat", model).generate(seed=1, **STEPS, **SIZE)[0]
    assert len({image.tobytes() for image in (whole, first, guess, plain)}) == 4
    off = pipe.generate(controlnet_conditioning_scale=0.0, **call)[0]
    assert off.tobytes() == plain.tobytes()


def test_the_command_prompt_files_and_replay(nets, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawing().save("photo.png")
    words = ["generate", "a cat", "--model", str(tiny_folder), "--steps", "4", "--seed", "1", "--controlnet"]
    words += [str(nets / "a"), "--control-image", "edges:photo.png", "--adapter-conditioning-scale", "0.8"]
    assert main([*words, "-o", "one.png"]) == 0
    assert main(["generate", "--from", "one.png", "--model", str(tiny_folder), "-o", "again.png"]) == 0
    line = f"a cat --controlnet {nets / 'a'} --control-image edges:photo.png --adapter-conditioning-scale 0.8 --d 1"
    drawn = render([line], "out", model=str(tiny_folder), num_inference_steps=4).paths
    one, *others = (np.asarray(Image.open(path)) for path in ("one.png", "again.png", *drawn))
    assert all(np.array_equal(one, other) for other in others) and len(others) == 2


def test_what_does_not_fit_is_one_line(model, nets, tmp_path):
    def refused(path, kind=ModelError):
        with pytest.raises(kind) as caught:
            Pipeline("a cat", model, controlnet=path).generate(control_image=drawing(), **STEPS)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    loud_adapter(channels=[32, 32]).save_pretrained(tmp_path / "other")
    assert "it gives features of 32 at 1/8, 32 at 1/16, and the U-Net takes 32 at 1/8, 64 at 1/16" in refused(
        tmp_path / "other"
    )
    folder, config = tmp_path / "b", tmp_path / "b" / "config.json"
    loud_adapter().save_pretrained(folder)
    settings, file = json.loads(config.read_text()), folder / "diffusion_pytorch_model.safetensors"
    for wrong, words in (({"adapter_type": "odd"}, "none of full_adapter"), ({"channels": [0]}, "at least 1")):
        config.write_text(json.dumps({**settings, **wrong}))
        assert words in (said := refused(folder)) and str(folder) in said
    config.write_text(json.dumps(settings))
    state = load_file(file)
    save_file({**state, "adapter.extra.weight": torch.ones(1)}, file)
    assert "1 unexpected (adapter.extra.weight)" in refused(folder)
    save_file({**state, "adapter.conv_in.bias": torch.full((32,), float("nan"))}, file)
    assert "holds NaN" in refused(folder)
    alone, single = tmp_path / "alone.safetensors", original(state)
    for change, words in (
        ({"body.1.in_conv.bias": None}, "1 missing (adapter.body.1.in_conv.bias)"),
        ({"body.0.block2.weight": None}, "1 missing (adapter.body.0.resnets.0.block2.weight)"),
        ({"conv_in.weight": None}, "holds no whole T2I-Adapter"),
        ({"body.9.block1.weight": torch.ones(1)}, "holds no whole T2I-Adapter"),
        ({"body.1.down_opt.op.weight": torch.ones(1)}, "1 unexpected (adapter.body.1.resnets.0.down_opt.op.weight)"),
        ({"conv_in.bias": torch.full((32,), float("nan"))}, "holds NaN"),
    ):
        changed = {name: tensor for name, tensor in {**single, **change}.items() if tensor is not None}
        save_file(changed, alone)
        assert words in (said := refused(alone)) and str(alone) in said
    save_file(original(loud_adapter(channels=[32, 48]).state_dict()), alone)
    assert "it gives features of 32 at 1/8, 48 at 1/16, and the U-Net takes" in refused(alone)
    save_file({"style_embedding": torch.ones(1)}, alone)
    assert "a style adapter of T2I-Adapter's, which is not supported" in refused(alone)
    torch.save(single, tmp_path / "t2iadapter_canny_sd14v1.pth")
    assert "only safetensors is opened" in refused(tmp_path / "t2iadapter_canny_sd14v1.pth")
    with pytest.raises(ConfigError, match="has no kinds"):
        Pipeline("a cat", model, controlnet=nets / "a").generate(control_image=drawing(), control_mode=1, **STEPS)
