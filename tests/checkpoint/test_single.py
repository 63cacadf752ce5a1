"""Single files: names by literal rules, back and forth without loss, and diffusers' images from what we write."""

import dataclasses
import hashlib
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm import Pipeline
from ldm.checkpoint import check_model, clear_cache, load_model, save_model
from ldm.checkpoint.safety import read_header
from ldm.errors import ModelError
from ldm.nn.text import T5Text
from tests.checkpoint.test_families_folders import FAMILIES, SIZE, build, ours, theirs

# Module in diffusers' folder -> module in the original code, for two levels of one layer and three of the autoencoder.
U_NET = """
conv_in input_blocks.0.0
time_embedding.linear_1 time_embed.0
time_embedding.linear_2 time_embed.2
add_embedding.linear_1 label_emb.0.0
add_embedding.linear_2 label_emb.0.2
down_blocks.0.resnets.0 input_blocks.1.0
down_blocks.0.attentions.0 input_blocks.1.1
down_blocks.0.downsamplers.0.conv input_blocks.2.0.op
down_blocks.1.resnets.0 input_blocks.3.0
down_blocks.1.attentions.0 input_blocks.3.1
mid_block.resnets.0 middle_block.0
mid_block.attentions.0 middle_block.1
mid_block.resnets.1 middle_block.2
up_blocks.0.resnets.0 output_blocks.0.0
up_blocks.0.resnets.1 output_blocks.1.0
up_blocks.0.attentions.0 output_blocks.0.1
up_blocks.0.attentions.1 output_blocks.1.1
up_blocks.0.upsamplers.0.conv output_blocks.1.UP.conv
up_blocks.1.resnets.0 output_blocks.2.0
up_blocks.1.resnets.1 output_blocks.3.0
up_blocks.1.attentions.0 output_blocks.2.1
up_blocks.1.attentions.1 output_blocks.3.1
conv_norm_out out.0
conv_out out.2
"""
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
VAE = """
down_blocks.0.resnets.0 down.0.block.0
down_blocks.0.downsamplers.0.conv down.0.downsample.conv
down_blocks.1.resnets.0 down.1.block.0
down_blocks.1.downsamplers.0.conv down.1.downsample.conv
down_blocks.2.resnets.0 down.2.block.0
up_blocks.0.resnets.0 up.2.block.0
up_blocks.0.resnets.1 up.2.block.1
up_blocks.0.upsamplers.0.conv up.2.upsample.conv
up_blocks.1.resnets.0 up.1.block.0
up_blocks.1.resnets.1 up.1.block.1
up_blocks.1.upsamplers.0.conv up.1.upsample.conv
up_blocks.2.resnets.0 up.0.block.0
up_blocks.2.resnets.1 up.0.block.1
mid_block.resnets.0 mid.block_1
mid_block.resnets.1 mid.block_2
mid_block.attentions.0.group_norm mid.attn_1.norm
mid_block.attentions.0.to_q mid.attn_1.q
mid_block.attentions.0.to_k mid.attn_1.k
mid_block.attentions.0.to_v mid.attn_1.v
mid_block.attentions.0.to_out.0 mid.attn_1.proj_out
conv_norm_out norm_out
conv_in conv_in
conv_out conv_out
"""
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def renamed(name, table):
    old, new = next(pair for pair in map(str.split, table.strip().splitlines()) if name.startswith(f"{pair[0]}."))
    return new + name[len(old) :]


def original_unet(state, up):
    found = {}
    for name, tensor in state.items():
        old = renamed(name, U_NET.replace("UP", up))
        inside = re.search(r"\.resnets\.\d\.(\w+)\.", name)
        old = old.replace(f".{inside[1]}.", f".{RESNET[inside[1]]}.") if inside else old
        found[f"model.diffusion_model.{old}"] = tensor
    return found


def original_vae(state):
    found = {}
    for name, tensor in state.items():
        side, _, inside = name.partition(".")
        if side in ("encoder", "decoder"):
            name = f"{side}.{renamed(inside, VAE).replace('conv_shortcut', 'nin_shortcut')}"
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name):
            tensor = tensor[:, :, None, None]
        found[f"first_stage_model.{name}"] = tensor
    return found


def original_open_clip(state, prefix):
    found = {}
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        layer = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", name)
        if layer and layer[2] == "self_attn.q_proj":
            stacked = [state[name.replace("q_proj", one)] for one in ("q_proj", "k_proj", "v_proj")]
            found[f"{prefix}transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(stacked)
        elif layer and layer[2] == "self_attn.out_proj":
            found[f"{prefix}transformer.resblocks.{layer[1]}.attn.out_proj.{layer[3]}"] = tensor
        elif layer and layer[2] in OPEN_CLIP:
            found[f"{prefix}transformer.resblocks.{layer[1]}.{OPEN_CLIP[layer[2]]}.{layer[3]}"] = tensor
    found[f"{prefix}token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    found[f"{prefix}positional_embedding"] = state["embeddings.position_embedding.weight"]
    found |= {f"{prefix}ln_final.{kind}": state[f"final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    if "text_projection.weight" in state:
        found[f"{prefix}text_projection"] = state["text_projection.weight"].t().contiguous()
    return found


def original(pipe, family):
    """The tensors of diffusers' pipeline under their original names, by the rules above."""
    found = original_unet(pipe.unet.state_dict(), "2" if family == "xl" else "1") | original_vae(pipe.vae.state_dict())
    text = pipe.text_encoder.state_dict()
    if family == "2.1-v":
        return found | original_open_clip(text, "cond_stage_model.model.")
    prefix = "conditioner.embedders.0.transformer." if family == "xl" else "cond_stage_model.transformer."
    found |= {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.items()}
    if family == "xl":
        found |= original_open_clip(pipe.text_encoder_2.state_dict(), "conditioner.embedders.1.model.")
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """family -> (diffusers' pipeline, its folder, the single file made of that)."""
    found = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp("singles") / family
        pipe = build(family)
        pipe.save_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        found[family] = pipe, folder, ldm.convert(folder, folder.with_suffix(".safetensors"))
    return found


def states(model):
    modules = (model.unet, model.vae.module, *model.text.modules)
    return {f"{i}.{name}": t for i, module in enumerate(modules) for name, t in module.state_dict().items()}


def same_bits(one, other):
    one, other = states(one), states(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_tensors_are_those_of_the_original_code(models, family):
    pipe, _, file = models[family]
    expected, found = original(pipe, family), load_file(file)
    flags = {"v_pred"} if family == "2.1-v" else set()
    assert found.keys() - expected.keys() == flags and expected.keys() <= found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_draws_our_image_from_the_file(models, family):
    import diffusers

    _, folder, file = models[family]
    kind = diffusers.StableDiffusionXLPipeline if family == "xl" else diffusers.StableDiffusionPipeline
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    images, latents = theirs(pipe, "ddim")
    model = load_model(file, "cpu", "fp32", cache=False)
    mine, final = ours(model, "ddim")
    assert np.abs(mine - images).max() <= 1 and images.std() > 25
    assert (final - latents).norm() <= 1e-4 * latents.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_to_file_to_folder_keeps_every_bit(models, family, tmp_path):
    _, folder, file = models[family]
    back = ldm.convert(file, tmp_path / "back")
    first, second = (load_model(place, "cpu", "fp32", cache=False) for place in (folder, back))
    assert same_bits(first, second) and first.schedule == second.schedule
    index, other = (json.loads((place / "model_index.json").read_text()) for place in (folder, back))
    for key in ("_class_name", "force_zeros_for_empty_prompt", "text_encoder", "text_encoder_2"):
        assert index.get(key) == other.get(key)
    text = ["a red cat!", "and a blue dog"]
    assert torch.equal(first.text.encode(text).states, second.text.encode(text).states)
    assert {p.name for p in (back / "unet").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_model_of_our_own_comes_back_whole(tiny, saved, tmp_path):
    """Pooled text, words that it knows, a schedule of its own, another tokenizer, a model card."""
    file = ldm.convert(saved, tmp_path / "tiny.safetensors")
    model = load_model(file, "cpu", "fp32", cache=False)
    assert same_bits(model, tiny) and model.schedule == tiny.schedule and model.unet.config == tiny.unet.config
    assert (model.name, model.path, model.info["trained_on"]) == ("tiny", file, "cpu")
    assert model.hash == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.equal(model.text.encode(["a cat"]).states, tiny.text.encode(["a cat"]).states)
    assert not any(p.requires_grad or p.is_meta for p in model.unet.parameters())
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    metadata = read_header(file).metadata
    assert metadata["modelspec.prediction_type"] == "v" and metadata["modelspec.sai_model_spec"] == "1.0.0"
    back = ldm.convert(file, tmp_path / "back", dtype="bf16")
    assert (back / "README.md").read_text() == (saved / "README.md").read_text()
    assert load_model(back, "cpu", "fp32").text.words == tiny.text.words


def test_a_model_with_t5_comes_back_whole(tmp_path):
    from tests.checkpoint.conftest import tiny_model
    from tests.checkpoint.test_t5 import encoder, tokenizer

    base = tiny_model()
    model = dataclasses.replace(base, text=T5Text(encoder(), tokenizer()), name="t5")
    file = ldm.convert(save_model(model, tmp_path / "t5", "fp32"), tmp_path / "t5.safetensors")
    assert "cond_stage_model.transformer.shared.weight" in load_file(file)
    found = load_model(file, "cpu", "fp32", cache=False)
    assert same_bits(found, model) and check_model(file) == file
    one, other = (m.text.encode(["a red cat", "zebra"]) for m in (model, found))
    assert torch.equal(one.states, other.states) and torch.equal(one.mask, other.mask)


def test_the_metadata_of_an_image_names_the_file(models):
    _, _, file = models["1.5"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    clear_cache()
    drawn = {}
    for asked in (None, "v"):
        pipe = Pipeline("a cat", file, prediction_type=asked)
        (drawn[asked],) = pipe.generate(seed=1, num_inference_steps=2, height=SIZE, width=SIZE)
        record = pipe.generate(seed=1, num_inference_steps=2, height=SIZE, width=SIZE).metadata[0]
        assert (record["model"], record["model_hash"]) == (file.stem, digest)
        assert record["schedule"]["prediction_type"] == ("v_prediction" if asked else "epsilon")
    assert np.abs(np.asarray(drawn[None], float) - np.asarray(drawn["v"], float)).max() > 5


def test_sizes_are_checked_before_a_weight_is_read(models, monkeypatch):
    _, _, file = models["1.5"]
    pipe = Pipeline("a cat", file)
    monkeypatch.setattr("ldm.checkpoint.single.read.read_tensors", None)
    with pytest.raises(ldm.errors.ConfigError, match="63 is not a multiple of 4"):
        pipe.generate(width=63)


def damaged(tmp_path, file, change, drop_settings=False):
    """A copy of a file after `change(tensors)`."""
    tensors, metadata = load_file(file), read_header(file).metadata
    change(tensors)
    save_file(tensors, tmp_path / "x.safetensors", {} if drop_settings else metadata)
    return tmp_path / "x.safetensors"


def test_old_and_odd_names_are_taken_and_counted(models, tmp_path):
    _, folder, file = models["2.1-v"]

    def change(tensors):
        inside = "cond_stage_model.model."
        last = {name: t for name, t in tensors.items() if f"{inside}transformer.resblocks.2." in name}
        tensors.update({name.replace("resblocks.2.", "resblocks.3."): t.clone() for name, t in last.items()})
        tensors[f"{inside}logit_scale"] = torch.tensor(4.6)
        tensors[f"{inside}text_projection"] = torch.eye(48)
        tensors["alphas_cumprod"] = torch.ones(1000)
        tensors["model_ema.decay"] = torch.tensor(0.99)
        tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.full((2,), float("nan"))
        for name in ("q", "k", "v", "proj_out"):  # as some tools write them
            tensors[f"first_stage_model.encoder.mid.attn_1.{name}.weight"].squeeze_()

    model = load_model(damaged(tmp_path, file, change), "cpu", "fp32", cache=False)
    assert same_bits(model, load_model(folder, "cpu", "fp32", cache=False))
    assert model.info["ignored_keys"] == {
        "model_ema.*": 2,
        "buffers of the schedule": 1,
        "cond_stage_model.model.logit_scale*": 1,
        "cond_stage_model.model.transformer.resblocks.3.*": 12,
        "cond_stage_model.model.text_projection*": 1,
    }


def test_position_ids_and_keys_without_the_prefix_load(models, tmp_path):
    _, folder, file = models["1.5"]

    def change(tensors):
        prefix = "cond_stage_model.transformer."
        for name in [name for name in tensors if name.startswith(f"{prefix}text_model.")]:
            tensors[name.replace("text_model.", "")] = tensors.pop(name)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(16)[None]

    model = load_model(damaged(tmp_path, file, change), "cpu", "fp32", cache=False)
    assert same_bits(model, load_model(folder, "cpu", "fp32", cache=False))


def test_leftovers_are_told_and_change_nothing(models, tmp_path, capsys):
    """What ComfyUI, sgm and other exporters leave behind; a file with the scales of fp8 is refused by that name."""
    _, folder, file = models["1.5"]
    more = {
        "model_sampling.sigmas": torch.ones(1000),
        "embedding_manager.embedder.x": torch.ones(2),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.transformer.vision_model.embeddings.class_embedding": torch.ones(8),
        "cond_stage_model.text_projection": torch.eye(4),
    }
    path = damaged(tmp_path, file, lambda tensors: tensors.update(more))
    model = load_model(path, "cpu", "fp32", cache=False)
    assert same_bits(model, load_model(folder, "cpu", "fp32", cache=False))
    assert "x.safetensors: 4 tensors that the model has no use for: " in capsys.readouterr().err  # a tower is known
    found = ldm.inspect(path)
    assert found["unapplied"] == [] and sum(found["ignored"].values()) == 5
    path = damaged(tmp_path, file, lambda tensors: tensors.update({"scaled_fp8": torch.ones(2)}))
    with pytest.raises(ModelError, match=r"holds scaled fp8 \(scaled_fp8\), which is not supported"):
        check_model(path)


def breaks():
    """(how to break a file's tensors, what is said); each file also holds NaN, which only reading would find."""

    def rename(tensors):
        for i in range(7):
            tensors[f"model.diffusion_model.stranger.{i}.weight"] = torch.ones(1)

    def drop(tensors):
        del tensors["model.diffusion_model.out.2.bias"]

    def shape(tensors):
        tensors["model.diffusion_model.out.2.bias"] = torch.ones(5)

    def no_vae(tensors):
        for name in [name for name in tensors if name.startswith("first_stage_model.")]:
            del tensors[name]

    def no_text(tensors):
        for name in [name for name in tensors if name.startswith("cond_stage_model.")]:
            del tensors[name]

    def narrow_text(tensors):
        for name in [name for name in tensors if "cond_stage_model" in name and "embedding" in name]:
            tensors[name] = tensors[name][:, :16].clone()

    return {
        "strangers": (rename, r"7 keys that belong to no part .*stranger\.0\.weight.*\.\.\."),
        "missing": (drop, "1 missing .conv_out.bias"),
        "shape": (shape, r"1 of another shape .conv_out.bias \[5\] instead of \[4\]"),
        "no vae": (no_vae, "holds no vae; give one with --vae"),
        "no text": (no_text, "holds no text_encoder"),
        "text": (narrow_text, "of another shape"),
    }


@pytest.mark.parametrize("name", breaks())
def test_what_does_not_fit_is_said_before_a_tensor_is_read(models, tmp_path, name):
    change, said = breaks()[name]

    def also_nan(tensors):
        change(tensors)
        tensors["model.diffusion_model.out.0.bias"][0] = float("nan")

    path = damaged(tmp_path, models["1.5"][2], also_nan)
    with pytest.raises(ModelError, match=said) as error:
        load_model(path, "cpu", "fp32", cache=False)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    if name in ("strangers", "no vae", "no text"):
        with pytest.raises(ModelError, match=said):
            check_model(path)


def test_numbers_that_are_none_are_named(models, tmp_path):
    path = damaged(tmp_path, models["1.5"][2], lambda t: t["model.diffusion_model.out.0.bias"].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"'model.diffusion_model.out.0.bias' holds NaN"):
        load_model(path, "cpu", "fp32", cache=False)
    path = damaged(tmp_path, models["1.5"][2], lambda t: None, drop_settings=True)
    with pytest.raises(ModelError, match=r"text of width 32, 4 channels in.* is of no known family"):
        check_model(path)


def test_a_file_of_ours_with_damaged_settings_is_refused(models, tmp_path):
    tensors, own = load_file(models["1.5"][2]), json.loads(read_header(models["1.5"][2]).metadata["ldm"])
    for settings in ("{", "[]", json.dumps({**own, "format": 2}), json.dumps({**own, "configs": {"unet": {}}})):
        save_file(tensors, tmp_path / "x.safetensors", {"ldm": settings})
        with pytest.raises(ModelError, match=r"x.safetensors: the settings in its header .format 1 is known"):
            check_model(tmp_path / "x.safetensors")


def test_an_autoencoder_comes_from_files_of_every_shape(models, saved, tmp_path):
    pipe, folder, file = models["1.5"]
    want = load_model(folder, "cpu", "fp32").vae.module.state_dict()
    bare = {name.removeprefix("first_stage_model."): t for name, t in original_vae(pipe.vae.state_dict()).items()}
    forms = {
        "bare": bare,
        "loss": {**bare, "loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(())},
        "prefixed": {f"first_stage_model.{name}": t for name, t in bare.items()},
        "diffusers": pipe.vae.state_dict(),
    }
    for name, tensors in forms.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        model = load_model(folder, "cpu", "fp32", vae=path)
        assert all(torch.equal(t, want[n]) for n, t in model.vae.module.state_dict().items())
        assert model.vae.scaling_factor == 0.18215 and len(model.hash) == 64
    whole = load_model(models["2.1-v"][1], "cpu", "fp32", vae=file)
    assert all(torch.equal(t, want[n]) for n, t in whole.vae.module.state_dict().items())
    assert load_model(file, "cpu", "fp32", vae=folder).hash != load_model(file, "cpu", "fp32").hash
    save_file({"a": torch.ones(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="holds no autoencoder"):
        Pipeline("a cat", folder, vae=tmp_path / "none.safetensors")
    save_file({**bare, "decoder.extra": torch.ones(1)}, tmp_path / "extra.safetensors")
    with pytest.raises(ModelError, match=r"1 keys that no autoencoder has .decoder.extra"):
        load_model(folder, "cpu", "fp32", vae=tmp_path / "extra.safetensors")


def test_the_channels_of_an_autoencoders_file_are_told_by_its_tensors(make, tmp_path, capsys):
    model, four = make.model(channels=8), make.model()
    save_model(model, tmp_path / "eight", dtype="fp32")
    save_file(model.vae.module.state_dict(), tmp_path / "eight.safetensors")
    save_file({**four.vae.module.state_dict(), "logvar": torch.zeros(1)}, tmp_path / "four.safetensors")
    loaded = Pipeline("a cat", tmp_path / "eight", vae=tmp_path / "eight.safetensors")
    assert loaded._engine.info.latent_channels == 8 and loaded._engine.info.factor == model.vae.factor
    assert load_model(tmp_path / "eight", "cpu", "fp32", vae=tmp_path / "eight.safetensors").vae.latent_channels == 8
    with pytest.raises(ModelError, match="8 channels in, 8 out, the VAE 4 latent channels"):
        load_model(tmp_path / "eight", "cpu", "fp32", vae=tmp_path / "four.safetensors")


def test_a_changed_file_is_loaded_anew(models, tmp_path):
    clear_cache()
    path = damaged(tmp_path, models["1.5"][2], lambda tensors: None)
    first = load_model(path, "cpu", "fp32")
    assert load_model(path, "cpu", "fp32") is first
    other = load_model(path, "cpu", "fp32", prediction_type="v")
    assert other is not first and other.schedule.prediction_type == "v_prediction" != first.schedule.prediction_type
    damaged(tmp_path, models["1.5"][2], lambda tensors: tensors["model.diffusion_model.out.2.bias"].add_(1))
    changed = load_model(path, "cpu", "fp32")
    assert changed is not first and changed.hash != first.hash


def test_checking_a_file_imports_no_torch(models):
    import subprocess
    import sys

    code = f"""
import sys
from ldm.checkpoint import check_model
check_model({str(models["xl"][2])!r})
print([m for m in ("torch", "diffusers", "transformers") if m in sys.modules])"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
