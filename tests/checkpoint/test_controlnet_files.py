"""ControlNets on disk: diffusers' folders and single files, in and out; what does not fit is refused by its headers."""

import dataclasses
import json
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.checkpoint.controlnet import controlnet_modules, find_controlnet, hash_of_controlnet, save_controlnet
from ldm.errors import LdmError, ModelError
from ldm.nn.controlnet import ControlNet, ControlNetConfig, load_controlnet
from ldm.nn.unet_config import UNetConfig
from tests.nn.test_controlnet import CONFIGS, FIXTURES, KINDS, peer

CPU = torch.device("cpu")


def info_of(config, name="base"):
    """As much of a ModelInfo as a ControlNet is fitted to."""
    unet = config.unet
    return types.SimpleNamespace(unet=unet, latent_channels=unet.in_channels, factor=config.factor, name=name)


def read(path, config):
    return find_controlnet(path, info_of(config)).load(CPU, torch.float32)


def equal(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("kind", (*KINDS, "bgr"))
def test_folders_go_to_diffusers_and_back(kind, tmp_path):
    from diffusers import ControlNetModel

    config, theirs = CONFIGS[kind], peer(CONFIGS[kind])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = read(tmp_path / "theirs", config)
    assert ours.control == config and equal(ours, theirs)
    save_controlnet(ours, tmp_path / "ours", torch.float32)
    again = ControlNetModel.from_pretrained(tmp_path / "ours")
    assert equal(again, theirs)
    assert not [key for key in theirs.config if key[0] != "_" and again.config[key] != theirs.config[key]]
    assert equal(read(tmp_path / "ours", config), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_single_files_go_to_diffusers_and_back(kind, tmp_path):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    config = dataclasses.replace(CONFIGS[kind], conditioning_embedding_out_channels=(8, 8, 16, 16))
    net = load_controlnet(config, peer(config).state_dict())
    file = save_controlnet(net, tmp_path / "net.safetensors", torch.float32)
    theirs = convert_controlnet_checkpoint(load_file(file), config.to_diffusers())
    known = {name: t for name, t in net.state_dict().items() if "add_embedding" not in name}  # it forgets XL's
    assert all(torch.equal(theirs[name], tensor) for name, tensor in known.items())
    assert equal(read(file, config), net)
    # as other programs write them: without settings, with and without the prefix, under diffusers' names
    plain = load_file(file)
    save_file(plain, tmp_path / "a.safetensors")
    save_file({key.removeprefix("control_model."): t for key, t in plain.items()}, tmp_path / "b.safetensors")
    save_file(dict(net.state_dict()), tmp_path / "c.safetensors")
    save_file({**plain, "model.diffusion_model.out.2.bias": torch.zeros(4)}, tmp_path / "d.safetensors")
    for name in "abcd":
        assert equal(read(tmp_path / f"{name}.safetensors", config), net), name


def test_original_names_at_full_width():
    config = ControlNetConfig.from_diffusers(FIXTURES.CONTROLNETS["controlnet_sd15"])
    table, new = controlnet_modules(config), FIXTURES.read("controlnet_sd15")
    for old, name in {  # of control_v11p_sd15_canny
        "zero_convs.11.0": "controlnet_down_blocks.11",
        "middle_block_out.0": "controlnet_mid_block",
        "input_hint_block.0": "controlnet_cond_embedding.conv_in",
        "input_hint_block.12": "controlnet_cond_embedding.blocks.5",
        "input_hint_block.14": "controlnet_cond_embedding.conv_out",
        "input_blocks.11.0.out_layers.3": "down_blocks.3.resnets.1.conv2",
        "time_embed.2": "time_embedding.linear_2",
    }.items():
        assert table[old] == name and f"{name}.weight" in new
    assert not any(name.startswith("up_blocks") for name in table.values())


def changed(file, path, change):
    state = load_file(file)
    change(state)
    save_file(state, path)
    return path


def test_what_does_not_fit_is_one_line_before_weights_are_read(tmp_path):
    config = CONFIGS["sd15"]
    net = load_controlnet(config, peer(config).state_dict())
    file, folder = tmp_path / "net.safetensors", tmp_path / "folder"
    save_controlnet(net, file, torch.float32)
    save_controlnet(net, folder, torch.float32)
    wider = ControlNetConfig(dataclasses.replace(config.unet, cross_attention_dim=32), 3, (8, 8, 16, 16))

    def refused(path, like=config):
        with pytest.raises(ModelError) as caught:
            read(path, like)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for path in (file, folder):
        assert "text of width 24, and the model base is text of width 32" in refused(path, wider)
        deeper = dataclasses.replace(config, unet=dataclasses.replace(config.unet, layers_per_block=1))
        assert "does not fit base: it has layers_per_block 2, and the model 1" in refused(path, deeper)
        coarse = dataclasses.replace(config, conditioning_embedding_out_channels=(8, 8))
        assert "pixels per latent 8, and the model 2" in refused(path, coarse)
    plain = tmp_path / "plain.safetensors"
    full = ControlNetConfig(UNetConfig(cross_attention_dim=2048))
    changed(file, plain, lambda state: None)
    assert "Stable Diffusion XL (text of width 2048)" in refused(plain, full)
    cut = changed(file, tmp_path / "cut.safetensors", lambda state: state.pop("control_model.zero_convs.0.0.bias"))
    assert "1 missing (controlnet_down_blocks.0.bias)" in refused(cut)
    new = changed(file, tmp_path / "new.safetensors", lambda s: s.update({"control_model.x.0.weight": torch.ones(1)}))
    assert "1 keys that no ControlNet of this model has (control_model.x.0.weight)" in refused(new)
    nan = changed(file, tmp_path / "nan.safetensors", lambda s: s["control_model.middle_block_out.0.bias"].fill_(1e400))
    assert "holds NaN or infinity" in refused(nan)
    for key, words in {
        "lora_controlnet": "Control-LoRA",
        "control_model.control_add_embedding.linear_1.bias": "ControlNet Union",
    }.items():
        relative = changed(file, tmp_path / "relative.safetensors", lambda s, key=key: s.update({key: torch.ones(1)}))
        assert words in refused(relative)
    for key, words in {"adapter.conv_in.weight": "T2I-Adapter", "x": "holds no ControlNet"}.items():
        save_file({key: torch.ones(1)}, tmp_path / "other.safetensors")
        assert words in refused(tmp_path / "other.safetensors")
    assert "no such ControlNet" in refused(tmp_path / "nothing")
    assert "holds no ControlNet (config.json is not there)" in refused(tmp_path)
    (tmp_path / "net.pth").write_bytes(b"\x80\x02")
    assert "pickle" in refused(tmp_path / "net.pth")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "_class_name": "T2IAdapter"}))
    assert "is of class 'T2IAdapter'" in refused(folder)
    (folder / "config.json").write_text(json.dumps({**settings, "controlnet_conditioning_channel_order": "gbr"}))
    assert "is neither rgb nor bgr" in (said := refused(folder)) and str(folder) in said


def test_a_changed_weight_changes_the_hash_and_a_damaged_one_is_found(tmp_path):
    net = ControlNet(CONFIGS["sd21"])
    folder = save_controlnet(net, tmp_path / "folder", torch.float32)
    before = hash_of_controlnet(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    assert hash_of_controlnet(folder) != before
    with pytest.raises(ModelError, match="is damaged"):
        read(folder, CONFIGS["sd21"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(LdmError, match="exists and is no ControlNet"):
        save_controlnet(net, tmp_path / "mine")
