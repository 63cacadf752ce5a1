"""What `inspect` says of folders, files and LoRAs, some of them at full width and without a byte of weights."""

import importlib.util
import json
import math
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm
from ldm.checkpoint import load_model
from ldm.checkpoint.families import FAMILIES
from ldm.checkpoint.lora.target import target_for
from ldm.checkpoint.safety import ITEM_BYTES
from ldm.checkpoint.single import save_single
from ldm.checkpoint.single.names import originals, parts_of
from ldm.cli import main
from ldm.errors import ModelError

SPEC = importlib.util.spec_from_file_location("fixtures_of_inspect", Path(__file__).parents[1] / "nn/make_fixtures.py")
FIXTURES = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(FIXTURES)
KINDS = {"sd1": "sd15", "sd2": "sd21", "xl": "xl", "sd1-inpainting": "inpaint"}  # family -> fixture
ATTENTION = "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"  # of 1.x and 2.x, as kohya names it


def sparse(path, tensors, metadata=None, first=b""):
    """A sound safetensors file that takes no room: name -> (dtype, shape); zeros after the bytes `first`."""
    table, position = {"__metadata__": metadata} if metadata else {}, 0
    for name, (dtype, shape) in tensors.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name], position = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}, end
    raw = json.dumps(table).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw + first)
        handle.truncate(8 + len(raw) + position)
    return path


def original(family, dtype="F16"):
    """The U-Net of a family at full width by its original names: name -> (dtype, shape)."""
    part = parts_of(FAMILIES[family].configs("epsilon"))["unet"]
    shapes = FIXTURES.read(KINDS[family])
    return {key: (dtype, shapes[place.names[0]]) for key, place in originals(part, shapes)}


def kohya(rank=4, alpha=None, width=768, layer=f"lora_unet_{ATTENTION}", out=640):
    found = {f"{layer}.lora_down.weight": torch.ones(rank, width), f"{layer}.lora_up.weight": torch.ones(out, rank)}
    return found | ({} if alpha is None else {f"{layer}.alpha": torch.tensor(float(alpha))})


def lines(found):
    from ldm.checkpoint.inspect_text import as_text

    return as_text(found)


@pytest.mark.parametrize("name", ["sd1", "sd2", "xl", "sd1-inpainting"])
def test_layers_are_those_of_the_networks(name):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    from ldm.nn.lora import layers_of
    from ldm.nn.unet import UNet, UNetConfig

    family = FAMILIES[name]
    target = target_for(family)
    with torch.device("meta"):
        modules = {"unet": UNet(UNetConfig.from_diffusers(family.unet))}
        for part, config in family.text.items():
            kind = CLIPTextModelWithProjection if "Projection" in config["architectures"][0] else CLIPTextModel
            modules[part] = kind(CLIPTextConfig.from_dict(dict(config)))
    assert target.shapes.keys() == modules.keys()
    for part, module in modules.items():
        theirs = {n.removeprefix("text_model."): tuple(m.weight.shape) for n, m in layers_of(module).items()}
        assert {n.removeprefix("text_model."): s for n, s in target.shapes[part].items()} == theirs


def test_a_folder_is_told_part_by_part(saved):
    found = ldm.inspect(saved)
    model = load_model(saved, "cpu", "fp32")
    count = {"unet": model.unet, "vae": model.vae.module, "text_encoder": model.text.model}
    for part, module in count.items():
        assert found["parts"][part]["parameters"] == sum(p.numel() for p in module.parameters())
        assert found["parts"][part]["dtypes"] == {"fp32": found["parts"][part]["parameters"]}
    assert found["parameters"] == sum(entry["parameters"] for entry in found["parts"].values())
    assert found["bytes"] == 4 * found["parameters"]
    expected = {"kind": "model", "format": "StableDiffusionPipeline folder", "family": None, "manifest": True}
    expected |= {"prediction_type": "v_prediction", "resolution": 32, "latent_channels": 4, "scaling_factor": 0.7}
    expected |= {"cross_attention_dim": 32, "unapplied": [], "metadata": {"trained_on": "cpu"}}
    assert expected.items() <= found.items()
    json.dumps(found)


def test_parts_and_runs(saved, tmp_path):
    vae, text, unet = (ldm.inspect(saved / part) for part in ("vae", "text_encoder", "unet"))
    assert (vae["kind"], vae["format"], vae["latent_channels"]) == ("autoencoder", "AutoencoderKL folder", 4)
    assert (text["kind"], text["width"], unet["kind"]) == ("text encoder", 32, "U-Net")
    shutil.copytree(saved, tmp_path / "run/model")
    found = ldm.inspect(tmp_path / "run")
    assert found["kind"] == "model" and found["run"] == str(tmp_path / "run")
    for part in ("vae", "text_encoder"):
        shutil.copytree(saved / part, tmp_path / f"{part}-run/model/{part}")
        assert ldm.inspect(tmp_path / f"{part}-run")["parts"].keys() == {part}
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    with pytest.raises(ModelError, match="is a run without a model yet"):
        ldm.inspect(tmp_path / "begun")


def test_a_single_file_of_ours_comes_with_its_settings(saved, tmp_path):
    model = load_model(saved, "cpu", "fp32")
    path = save_single(model, tmp_path / "m.safetensors", torch.bfloat16, card="# A card\n")
    found, folder = ldm.inspect(path), ldm.inspect(saved)
    for key in ("kind", "parameters", "prediction_type", "resolution", "latent_channels", "family"):
        assert found[key] == folder[key], key
    assert {part: entry["parameters"] for part, entry in found["parts"].items()} == {
        part: entry["parameters"] for part, entry in folder["parts"].items()
    }
    assert found["dtypes"] == {"bf16": found["parameters"]} and found["unapplied"] == found["notes"] == []
    assert "ldm" not in found["metadata"] and found["metadata"]["modelspec.title"]
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stranger = "model.diffusion_model.stranger.weight"
    save_file({**load_file(path), stranger: torch.ones(2), "leftover.weight": torch.ones(2)}, path, metadata)
    assert ldm.inspect(path)["unapplied"] == [{"key": stranger, "why": "belongs to no part of the model"}]
    assert ldm.inspect(path)["ignored"] == {"leftover.*": 1}
    with pytest.raises(ModelError, match="stranger"):
        load_model(path, "cpu", "fp32")


@pytest.mark.parametrize("name", KINDS)
def test_a_full_width_file_is_told_within_a_second(name, tmp_path):
    path = sparse(tmp_path / "m.safetensors", original(name), {"modelspec.author": "someone"})
    start = time.process_time()
    found = ldm.inspect(path)
    assert time.process_time() - start < 1
    assert path.stat().st_size > 1.7e9 and found["bytes"] > 1.7e9
    assert (found["family"], found["title"]) == (name, FAMILIES[name].title)
    assert found["parameters"] == sum(math.prod(shape) for shape in FIXTURES.read(KINDS[name]).values())
    assert found["dtypes"] == {"fp16": found["parameters"]} and found["metadata"] == {"modelspec.author": "someone"}
    assert {"holds no vae", "holds no text_encoder"} <= set(found["notes"])
    unsaid = any("prediction type is not in the file" in note for note in found["notes"])
    assert found["prediction_type"] == (None if name == "sd2" else "epsilon") and unsaid == (name == "sd2")


@pytest.mark.parametrize("name", ["sd2", "xl"])
def test_a_full_width_folder_of_the_fp16_variant_is_told(name, tmp_path):
    family = FAMILIES[name]
    configs, xl = family.configs("v_prediction"), "XL" if name == "xl" else ""
    index = {"_class_name": f"StableDiffusion{xl}Pipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    for part, config in configs.items():
        tensors = {"some.weight": ("F16", (2, 3))}
        if part == "unet":
            tensors = {key: ("F16", shape) for key, shape in FIXTURES.read(KINDS[name]).items()}
        if part.startswith("text"):
            index |= {part: ["transformers", config["architectures"][0]]}
            index |= {part.replace("text_encoder", "tokenizer"): ["transformers", "CLIPTokenizer"]}
            (tmp_path / part.replace("text_encoder", "tokenizer")).mkdir()
            (tmp_path / part.replace("text_encoder", "tokenizer") / "tokenizer.json").write_text("{}")
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        if part != "scheduler":
            sparse(tmp_path / part / f"{stem}.fp16.safetensors", tensors)
        (tmp_path / part).mkdir(exist_ok=True)
        (tmp_path / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    start = time.process_time()
    found = ldm.inspect(tmp_path)
    assert time.process_time() - start < 1
    assert found["format"] == f"StableDiffusion{xl}Pipeline folder (fp16 variant)"
    assert (found["family"], found["prediction_type"], found["manifest"]) == (name, "v_prediction", False)
    assert found["resolution"] == (1024 if name == "xl" else 768)
    assert found["parts"].keys() == {"unet", "vae", *family.text}
    assert found["parameters"] == found["parts"]["unet"]["parameters"] + 6 * (len(found["parts"]) - 1)


def test_what_says_the_prediction_type_is_heard(tmp_path):
    path = sparse(tmp_path / "m.safetensors", original("sd2"))
    (tmp_path / "m.yaml").write_text("model:\n  params:\n    parameterization: v\n")
    assert ldm.inspect(path)["prediction_type"] == "v_prediction"
    sparse(path, {**original("sd2"), "v_pred": ("F16", (0,))})
    (tmp_path / "m.yaml").unlink()
    assert ldm.inspect(path)["prediction_type"] == "v_prediction"


def test_a_kohya_lora_tells_base_rank_alpha_and_training(tmp_path):
    metadata = {"ss_sd_model_name": "v1-5.safetensors", "ss_base_model_version": "sd_v1", "ss_epoch": "3"}
    save_file(kohya(4, 2), tmp_path / "l.safetensors", metadata)
    found = ldm.inspect(tmp_path / "l.safetensors")
    assert (found["kind"], found["format"], found["family"]) == ("LoRA", "kohya keys", "sd1")
    assert found["lora"] == {"layers": 1, "rank": 4, "alpha": 2.0, "alpha_assumed": 0}
    assert found["base_model"] == "v1-5.safetensors" and found["metadata"] == metadata
    assert found["parameters"] == 4 * 768 + 640 * 4 and found["unapplied"] == []


def test_keys_that_would_not_apply_are_told_with_the_reason(tmp_path):
    stranger = kohya(4, layer="lora_unet_down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q", out=768)
    te = kohya(4, layer="lora_te_text_model_encoder_layers_12_mlp_fc1", out=3072)
    save_file({**kohya(4), **stranger, **te, "emb": torch.ones(1)}, tmp_path / "l.safetensors")
    found = ldm.inspect(tmp_path / "l.safetensors")
    why = {entry["key"]: entry["why"] for entry in found["unapplied"]}
    missing = "Stable Diffusion 1.x has no such layer"
    assert why == {**dict.fromkeys([*stranger, *te], missing), "emb": "belongs to no low-rank update"}
    assert found["lora"]["alpha"] is None and found["lora"]["alpha_assumed"] == 3
    text = lines(found)
    assert "5 keys would not be applied" in text and missing in text
    wide = kohya(4, out=64)  # of the right name and the wrong shape
    save_file(wide, tmp_path / "w.safetensors")
    found = ldm.inspect(tmp_path / "w.safetensors")
    assert len(found["unapplied"]) == 2 and "shape" in found["unapplied"][0]["why"]


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (kohya(width=1024), {"family": "sd2"}),
        (
            kohya(width=2048, layer="lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
            {"family": "xl", "unapplied": []},
        ),
        (
            kohya(width=1280, out=1280, layer="lora_te2_text_model_encoder_layers_31_self_attn_q_proj"),
            {"family": "xl", "unapplied": []},
        ),
        (kohya(width=192), {"family": None, "unapplied": []}),
        (
            {**kohya(4, 8), f"lora_unet_{ATTENTION}.dora_scale": torch.ones(640, 1)},
            {"family": "sd1", "kind": "DoRA", "unapplied": []},
        ),
        (
            {
                f"unet.{ATTENTION.replace('down_blocks_1', 'down_blocks.1').replace('_0_', '.0.')}": torch.ones(1),
                "lora": torch.ones(1),
            },
            {"kind": "other"},
        ),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, {"kind": "other"}),
    ],
)
def test_kinds_and_bases_of_loras(tensors, expected, tmp_path):
    save_file(tensors, tmp_path / "l.safetensors")
    found = ldm.inspect(tmp_path / "l.safetensors")
    assert expected.items() <= found.items()
    assert ldm.inspect(tmp_path)["kind"] == found["kind"]  # a folder with this one file


def test_peft_tells_alpha_in_its_header(tmp_path):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{layer}.lora_A.weight": torch.ones(8, 768), f"{layer}.lora_B.weight": torch.ones(640, 8)}
    settings = json.dumps({"unet.r": 8, "unet.lora_alpha": 16})
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", {"lora_adapter_metadata": settings})
    (tmp_path / "other.safetensors").write_bytes(b"")
    found = ldm.inspect(tmp_path)
    assert (found["format"], found["lora"]["rank"], found["lora"]["alpha"]) == ("peft keys", 8, 16.0)


OTHERS = {
    "control_model.input_blocks.0.0.weight": "ControlNet",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "text_model.encoder.layers.0.mlp.fc1.weight": "is a CLIP text encoder alone",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "is a T5 text encoder alone",
    "anything": "holds no U-Net of Stable Diffusion",
    "model_ema.diffusion_modelinput_blocks00weight": "holds averaged weights (model_ema)",
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_is_something_else_says_so(key, tmp_path):
    found = ldm.inspect(sparse(tmp_path / "m.safetensors", {key: ("F16", (3, 5))}))
    assert found["kind"] == "other" and OTHERS[key] in found["what"] and found["parameters"] == 15


def test_a_lone_unet_and_autoencoder_are_told(tmp_path, tiny):
    shapes = {name: ("BF16", shape) for name, shape in FIXTURES.read("sd15").items()}
    found = ldm.inspect(sparse(tmp_path / "u.safetensors", shapes))
    assert (found["kind"], found["family"], found["dtypes"]) == ("U-Net", "sd1", {"bf16": found["parameters"]})
    save_file(tiny.vae.module.state_dict(), tmp_path / "v.safetensors")
    assert ldm.inspect(tmp_path / "v.safetensors")["kind"] == "autoencoder"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("m.ckpt", b"\x80\x02", "pickle"),
        ("m.safetensors", b"PK\x03\x04" + bytes(99), "pickle"),
        ("m.safetensors", b"", "has no header"),
        ("notes.txt", b"hello", "neither a model folder nor a weight file"),
        ("folder/m.bin", b"\x80\x02", "pickle"),
        ("folder/notes.txt", b"hello", "holds no model"),
        ("folder/config.json", b'{"_class_name": "SanaTransformer2DModel"}', "SanaTransformer2DModel, which is not"),
        ("folder/config.json", b"{}", "unknown class"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_exit_2(name, content, said, tmp_path, capsys):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    place = tmp_path / name.partition("/")[0]
    with pytest.raises(ModelError, match=said):
        ldm.inspect(place)
    assert main(["inspect", str(place)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error
    with pytest.raises(ModelError, match="no such file or folder"):
        ldm.inspect(tmp_path / "missing")


def test_the_command_prints_text_or_json_and_imports_no_torch(saved, tmp_path):
    save_file(kohya(4, 2), tmp_path / "l.safetensors", {"ss_tag": "\x1b[2J" + "x" * 9999})
    program = "import sys\nfrom ldm.cli import main\nassert main(sys.argv[1:]) == 0\n"
    program += "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules], file=sys.stderr)"

    def run(*words):
        command = [sys.executable, "-c", program, "inspect", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.strip() == "[]"
        return done.stdout

    assert json.loads(run(tmp_path / "l.safetensors", "--json")) == ldm.inspect(tmp_path / "l.safetensors")
    text = run(tmp_path / "l.safetensors")
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 200 and "(10,003 characters)" in text
    assert "kind" in text and "LoRA" in text and "Stable Diffusion 1.x" in text
    assert json.loads(run(saved, "--json")) == ldm.inspect(saved)
