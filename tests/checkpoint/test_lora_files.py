"""LoRA files: every spelling of a layer, where alpha comes from, what is refused and when, the names that we write."""

import json

import pytest
import torch

from ldm import Pipeline
from ldm.checkpoint.lora import (
    match_layers,
    read_lora,
    read_lora_header,
    target_at,
    with_loras,
    write_lora,
    write_lora_into,
)
from ldm.checkpoint.lora.names import kohya_name, sgm_names
from ldm.errors import ModelError
from ldm.nn.lora import LowRank, layers_of
from ldm.nn.unet import UNet, UNetConfig
from tests.checkpoint.lora_cases import Q, apart, ours, pair

XL = UNetConfig(
    block_out_channels=(320, 640, 1280),
    transformer_layers=(0, 2, 10),
    mid_transformer_layers=10,
    num_heads=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SD_SCRIPTS = {  # as in files that sd-scripts trains on SDXL
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": "input_blocks_8_1_transformer_blocks_9_ff_net_2",
    "mid_block.attentions.0.transformer_blocks.5.attn2.to_out.0": "middle_block_1_transformer_blocks_5_attn2_to_out_0",
    "mid_block.resnets.1.conv1": "middle_block_2_in_layers_2",
    "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
    "up_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "output_blocks_3_1_transformer_blocks_1_attn2_to_k",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
    "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
    "conv_in": "input_blocks_0_0",
    "conv_out": "out_2",
    "add_embedding.linear_2": "label_emb_0_2",
}


def test_xl_names_are_those_of_sd_scripts_at_full_width():
    with torch.device("meta"):
        names = list(layers_of(UNet(XL)))
    originals = sgm_names(names, XL)
    assert originals.keys() == set(names) and len(set(originals.values())) == len(names)
    for name, flat in SD_SCRIPTS.items():
        assert kohya_name("unet", name, originals, xl=True) == f"lora_unet_{flat}"
    text = "encoder.layers.3.self_attn.q_proj"
    assert kohya_name("text_encoder", text, {}, xl=True) == "lora_te1_text_model_encoder_layers_3_self_attn_q_proj"
    assert kohya_name("text_encoder", text, {}, xl=False) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    assert kohya_name("text_encoder_2", f"text_model.{text}", {}, xl=True).startswith("lora_te2_text_model_encoder")


# Spellings

OUT = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0"
TEXT_Q, TEXT_OUT = "encoder.layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.out_proj"
SPELLINGS = {
    "peft": (f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight", ("unet", Q)),
    "diffusers": (f"unet.{Q}.lora.down.weight", f"unet.{Q}.lora.up.weight", ("unet", Q)),
    "processor": (
        f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}.down.weight",
        f"unet.{Q.replace('.to_q', '.processor.to_q_lora')}.up.weight",
        ("unet", Q),
    ),
    "oldest, without prefix": (
        f"{OUT.replace('.to_out.0', '.processor.to_out_lora')}.down.weight",
        f"{OUT.replace('.to_out.0', '.processor.to_out_lora')}.up.weight",
        ("unet", OUT),
    ),
    "text": (
        f"text_encoder.text_model.{TEXT_Q}.lora_linear_layer.down.weight",
        f"text_encoder.text_model.{TEXT_Q}.lora_linear_layer.up.weight",
        ("text_encoder", TEXT_Q),
    ),
    "text of transformers 5": (
        f"text_encoder.{TEXT_Q}.lora_A.weight",
        f"text_encoder.{TEXT_Q}.lora_B.weight",
        ("text_encoder", TEXT_Q),
    ),
    "old text": (
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.down.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.to_out_lora.up.weight",
        ("text_encoder", TEXT_OUT),
    ),
    "kohya": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
        ("unet", OUT),
    ),
    "kohya, the original code's names": (
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_up.weight",
        ("unet", Q),
    ),
    "kohya text": (
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_up.weight",
        ("text_encoder", TEXT_Q),
    ),
    "kohya text, numbered": (
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_1_self_attn_out_proj.lora_up.weight",
        ("text_encoder", TEXT_OUT),
    ),
    "peft's own files": (
        f"base_model.model.{Q}.lora_A.weight",
        f"base_model.model.{Q}.lora_B.weight",
        ("unet", Q),
    ),
    "peft's own files of a part": (
        f"text_encoder.base_model.model.text_model.{TEXT_Q}.lora_A.weight",
        f"text_encoder.base_model.model.text_model.{TEXT_Q}.lora_B.weight",
        ("text_encoder", TEXT_Q),
    ),
    "compiled and in parallel": (
        f"module._orig_mod.{Q}.lora_A.weight",
        f"module._orig_mod.{Q}.lora_B.weight",
        ("unet", Q),
    ),
    "lycoris": (
        "lycoris_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        "lycoris_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_up.weight",
        ("unet", OUT),
    ),
    "around the original network": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_up.weight",
        ("unet", Q),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_finds_its_layer(trained, name, lora_file):
    down, up, place = SPELLINGS[name]
    file = lora_file({down: torch.randn(2, 32), up: torch.randn(32, 2)})
    found = match_layers(read_lora_header(file), target_at(trained("1.5").folder))
    assert list(found.layers.values()) == [place] and found.unapplied == ()


def alpha_of(file):
    (entry,) = read_lora_header(file).entries.values()
    return entry.alpha


def test_where_alpha_comes_from(lora_file):
    def told(**settings):
        return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}

    assert alpha_of(lora_file(pair())) == 2 and read_lora_header(lora_file(pair())).assumed == 1
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64):
        number = torch.tensor(3 if dtype == torch.int64 else 1.5, dtype=dtype)
        assert alpha_of(lora_file(pair() | {f"unet.{Q}.alpha": number})) == float(number)
    assert alpha_of(lora_file(pair(), told(lora_alpha=16, r=2))) == 16
    assert alpha_of(lora_file(pair(), told(lora_alpha=16, alpha_pattern={"attn1.to_q": 3}))) == 3
    assert alpha_of(lora_file(pair(), told(lora_alpha=16, alpha_pattern={f"^{Q}": 4}))) == 4
    assert alpha_of(lora_file(pair(), told(lora_alpha=16, use_rslora=True))) == pytest.approx(16 * 2**0.5)
    assert alpha_of(lora_file(pair() | {f"unet.{Q}.alpha": torch.tensor(5.0)}, told(lora_alpha=16))) == 5
    assert alpha_of(lora_file(pair(), {"ss_network_alpha": "8.0", "ss_network_dim": "2"})) == 8
    assert alpha_of(lora_file(pair(), {"ss_network_alpha": "8.0", "ss_network_dim": "4"})) == 2


def test_alpha_in_the_settings_that_peft_keeps_beside_its_file(lora_file, tmp_path):
    file = lora_file(pair(f"base_model.model.{Q}"), name="adapter_model")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 12}))
    assert alpha_of(file) == alpha_of(tmp_path) == 12 and read_lora_header(file).assumed == 0


def test_alpha_from_kohyas_header_alone_is_said(trained, lora_file, capsys):
    file = lora_file(pair(), {"ss_network_alpha": "8.0", "ss_network_dim": "2"})
    Pipeline("a cat", trained("1.5").folder, lora=file)
    assert "alpha of 1 layers is the header's ss_network_alpha" in capsys.readouterr().err


def test_a_missing_alpha_is_said_once(trained, lora_file, capsys):
    file = lora_file(pair())
    pipe = Pipeline(["a cat", "a dog"], trained("1.5").folder, lora=[file, (file, -1)])
    pipe.generate(num_inference_steps=1, sampler="ddim")
    assert capsys.readouterr().err.count("it is taken to be the rank") == 1


NAN = pair()
NAN[f"unet.{Q}.lora_B.weight"][3, 1] = float("nan")
REFUSED = {
    "no place": (pair("unet.nowhere.to_q"), "not one of its 1 layers is in this model"),
    "some without place": (
        pair() | pair("unet.nowhere.to_q"),
        "2 of 4 keys match no layer of this model: unet.nowhere",
    ),
    "unknown key": (
        pair() | {"unet.conv_in.diff": torch.ones(3)},
        "1 of 3 keys match no layer of this model: unet.conv_in.diff",
    ),
    "text width": (
        pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", inputs=1024),
        "this LoRA is for cross_attention_dim 1024, this model has 32",
    ),
    "shape": (pair(inputs=48), r"unet.down_blocks.*to_q is for weights of shape \[32, 48\], this model has \[32, 32\]"),
    "half": ({f"unet.{Q}.lora_A.weight": torch.ones(2, 32)}, "has no up weight"),
    "ranks": (pair() | {f"unet.{Q}.lora_B.weight": torch.ones(32, 3)}, "which are no LoRA"),
    "loha": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2, 2)}, "an adapter of the kind LoHa, which is not supported"),
    "tucker": (pair() | {f"unet.{Q}.lora_mid.weight": torch.ones(2, 2)}, "LoCon in Tucker form"),
    "a model": ({"conv_in.weight": torch.ones(2, 2)}, "holds no LoRA layer"),
    "nan": (NAN, "lora_B.weight' holds NaN or infinity"),
    "alpha nan": (pair() | {f"unet.{Q}.alpha": torch.tensor(float("inf"))}, "the alpha of .* is inf"),
    "alpha shape": (pair() | {f"unet.{Q}.alpha": torch.ones(2)}, r"an alpha of shape \[2\]"),
    "magnitudes": (pair() | {f"unet.{Q}.dora_scale": torch.ones(1, 32)}, "not one for each of 32 outputs"),
    "twice": (
        pair() | {key.replace("unet.", ""): tensor.clone() for key, tensor in pair().items()},
        "are the same layer of this model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(trained, name, lora_file):
    tensors, message = REFUSED[name]
    file = lora_file(tensors)
    with pytest.raises(ModelError, match=message) as caught:
        Pipeline("a cat", trained("1.5").folder, lora=file).generate(num_inference_steps=1)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "nan"])
def test_and_before_any_weight_is_read(trained, name, lora_file, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    folder, file = trained("1.5").folder, lora_file(REFUSED[name][0])
    monkeypatch.setattr("ldm.checkpoint.lora.read.read_tensors", refuse)
    monkeypatch.setattr("ldm.checkpoint.load_model", refuse)
    with pytest.raises(ModelError):
        Pipeline("a cat", folder, lora=file)


def test_damaged_headers_are_refused(trained, lora_file, tmp_path):
    for settings in (
        "{",
        "[1]",
        '{"unet.lora_alpha": "x"}',
        '{"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_x": 1}}',
    ):
        with pytest.raises(ModelError, match=r"cannot be understood|names no layer"):
            read_lora_header(lora_file(pair(), {"lora_adapter_metadata": settings}))
    (tmp_path / "old.safetensors").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02}q\x00.")
    for name, message in {
        "old.safetensors": "pickle",
        "empty": "has no pytorch_lora",
        "pickle": "pickle",
        "no": "no such file",
    }.items():
        with pytest.raises(ModelError, match=message):
            Pipeline("a cat", trained("1.5").folder, lora=tmp_path / name)


def test_unapplied_keys_can_be_allowed_and_are_counted(trained, lora_file, capsys):
    folder = trained("1.5").folder
    lone, more = lora_file(pair(), name="lone"), lora_file(pair() | pair("unet.nowhere.to_q"), name="more")
    one, _ = ours(folder, lora=lone)
    assert capsys.readouterr().err.count("\n") == 1  # alpha
    other, _ = ours(folder, lora=more, allow_unapplied=True)
    assert capsys.readouterr().err.count("2 keys are not applied: unet.nowhere.to_q.lora_A") == 1
    assert apart(one, other) == 0 and apart(one, trained("1.5").plain) > 5
    with pytest.raises(ModelError, match="not one of its 1 layers"):
        Pipeline("a cat", folder, lora=lora_file(pair("unet.nowhere.to_q")), allow_unapplied=True)


def test_a_manifest_beside_the_file_is_checked(trained, tmp_path):
    file = trained("1.5").written(tmp_path / "mine", "peft")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ModelError, match="does not match the manifest"):
        read_lora(file)


def test_layers_of_the_model_alone_are_written(trained, tmp_path):
    model, update = trained("1.5").model, LowRank(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    with pytest.raises(ModelError, match=r"no layer unet\.nowhere"):
        write_lora(tmp_path / "x", model, {"unet": {"nowhere": update}})
    bad = LowRank(update.down, update.up * float("nan"), 1.0)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        write_lora(tmp_path / "x", model, {"unet": {Q: bad}})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(ModelError, match="no LoRA's folder"):
        write_lora(tmp_path / "mine", model, {"unet": {Q: update}})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert with_loras(model, []).unet is model.unet


def test_a_file_is_the_same_however_often_it_is_written(trained, tmp_path):
    """safetensors orders metadata at random."""
    model, update = trained("1.5").model, LowRank(torch.ones(2, 32), torch.ones(32, 2), 1.0)
    files = [write_lora_into(tmp_path / f"{i}", "x", model, {"unet": {Q: update}}, words=["a"]) for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    assert len({(file.parent / "x.safetensors").read_bytes() for file in files}) == 1
    assert read_lora(files[0]).header.words == {"a"} and read_lora(files[0]).header.unknown == ()
