"""open_clip's text towers: the same states as the text encoders that are made from them. Runs where open_clip is."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ldm.checkpoint import Model, save_model
from ldm.checkpoint.build import clip_text
from ldm.checkpoint.open_clip import load_open_clip
from ldm.checkpoint.vocabulary import clip_tokenizer
from ldm.errors import ConfigError, ModelError
from ldm.nn.text import OpenClipText, XLText, encode_weighted, tokenize
from ldm.prompts import parse

pytest.importorskip("open_clip", reason="the extra open-clip is not installed")

TEXTS = ["a red cat", "", "two DOGS, on 2 blue cards", "a cat " * 60]
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def converted(tower, layers, projected):
    """The tower in transformers' form, by a list of names of this test's own."""
    state = {
        "text_model.embeddings.token_embedding.weight": tower.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": tower.positional_embedding,
        "text_model.final_layer_norm.weight": tower.ln_final.weight,
        "text_model.final_layer_norm.bias": tower.ln_final.bias,
    }
    for i, block in enumerate(tower.transformer.resblocks[:layers]):
        to = f"text_model.encoder.layers.{i}"
        for old, new in BLOCK.items():
            module = block.get_submodule(old)
            state |= {f"{to}.{new}.weight": module.weight, f"{to}.{new}.bias": module.bias}
        for name, weight, bias in zip("qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)):
            state |= {f"{to}.self_attn.{name}_proj.weight": weight, f"{to}.self_attn.{name}_proj.bias": bias}
    if projected:
        state["text_projection.weight"] = tower.text_projection.T
    config = {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "vocab_size": 49408,
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "projection_dim": 24,
        "eos_token_id": 2,
    }
    return clip_text(config, {k: t.detach().contiguous() for k, t in state.items()}, clip_tokenizer("!"), "here")


@pytest.fixture(scope="module")
def tokenizer():
    import open_clip

    return open_clip.SimpleTokenizer()


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_the_states_are_those_of_stable_diffusion_2s_text_encoder(tower, tokenizer, clip_skip):
    """The last layer but one through the final norm: a conversion has a layer less."""
    ours, theirs = OpenClipText(tower, tokenizer), converted(tower, 3, projected=False)
    found, expected = (text.encode(TEXTS, clip_skip) for text in (ours, theirs))
    assert found.states.shape == (4, 77, 32) and found.mask is None and not found.states.requires_grad
    assert torch.allclose(found.states, expected.states, atol=1e-5)
    assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
    assert not torch.allclose(found.states, OpenClipText(tower, tokenizer, 0).encode(TEXTS, clip_skip).states, atol=0.1)
    with pytest.raises(ConfigError, match="clip_skip 3 is impossible: the text encoder has 3 layers"):
        ours.encode(TEXTS, 3)


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_as_xls_second_encoder(tower, tokenizer, clip_skip):
    first, second = converted(tower, 3, projected=False), converted(tower, 4, projected=True)
    ours, theirs = (XLText(first, text, True) for text in (OpenClipText(tower, tokenizer, 0), second))
    found, expected = (text.encode([*TEXTS, None], clip_skip) for text in (ours, theirs))
    assert found.states.shape == (5, 77, 64) and found.pooled.shape == (5, 24)
    assert torch.allclose(found.states, expected.states, atol=1e-5)
    assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
    assert not found.states[4].any() and found.states[1].any()


def test_weights_and_chunks(tower, tokenizer):
    ours, theirs = OpenClipText(tower, tokenizer), converted(tower, 3, projected=False)
    prompts = ["a (red:1.4) cat", "cat " * 80 + "BREAK [a dog]", *TEXTS[:3]]
    read = [(text, [tokenize(text, parse(prompt)) for prompt in prompts]) for text in (ours, theirs)]
    found, expected = (encode_weighted(text, tokens) for text, tokens in read)
    assert found.states.shape == (5, 3 * 77, 32)
    assert torch.allclose(found.states, expected.states, atol=1e-5)
    assert torch.allclose(found.pooled, expected.pooled, atol=1e-5)
    assert torch.equal(encode_weighted(ours, read[0][1][2:]).states[:, :77], ours.encode(TEXTS[:3]).states)


def test_bits_and_what_is_cut_off(tower, tokenizer):
    text = OpenClipText(tower, tokenizer)
    together = text.encode(TEXTS)
    assert torch.equal(text.encode(TEXTS[2:3]).states[0], together.states[2])
    assert torch.equal(text.encode([None]).states[0], together.states[1])
    assert torch.allclose(text.encode_together(TEXTS).states, together.states, atol=1e-5)
    assert text.truncated("a red cat") == "" and text.truncated("cat " * 75 + "a red card") == "a red card"
    assert text.unknown_words("a zebra") == [] and text.modules == (tower,)


@pytest.mark.parametrize("form", ["whole", "tower"])
def test_a_file_of_open_clip_loads(tower, tmp_path, monkeypatch, form):
    import open_clip

    sizes = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 4}
    (tmp_path / "tiny-14.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": {}, "text_cfg": sizes}))
    (tmp_path / "other-14.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": {}, "text_cfg": {**sizes, "embed_cls": True}})
    )
    open_clip.add_model_config(tmp_path)
    prefix = "text." if form == "tower" else ""
    state = {prefix + name: tensor.contiguous() for name, tensor in tower.state_dict().items()}
    if form == "whole":
        state |= {"visual.proj": torch.zeros(3, 3), "logit_scale": torch.tensor(4.6)}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    text = load_open_clip("tiny-14", tmp_path / "open_clip_model.safetensors", "cpu", torch.float32)
    expected = OpenClipText(tower, text.tokenizer).encode(TEXTS)
    assert torch.equal(text.encode(TEXTS).states, expected.states) and not next(text.model.parameters()).requires_grad
    half = load_open_clip("tiny-14", tmp_path / "open_clip_model.safetensors", "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.encode(TEXTS).states.float(), expected.states, atol=0.2)
    for name, said in {"other-14": "another kind of text tower", "ViT-H-15": "knows no model 'ViT-H-15'"}.items():
        with pytest.raises(ModelError, match=said):
            load_open_clip(name, tmp_path / "open_clip_model.safetensors", "cpu", torch.float32)
    with pytest.raises(ModelError, match="do not fit TextTransformer"):
        load_open_clip("ViT-H-14", tmp_path / "open_clip_model.safetensors", "cpu", torch.float32)


def test_other_towers_and_saving_are_refused(tower, tokenizer, tmp_path):
    from open_clip.transformer import TextTransformer

    for change in ({"no_causal_mask": True}, {"pool_type": "last"}, {"embed_cls": True}):
        with pytest.raises(ModelError, match="not causal"):
            OpenClipText(TextTransformer(width=32, heads=4, layers=1, **change), tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has 49408 tokens, the text encoder 100"):
        OpenClipText(TextTransformer(vocab_size=100, width=32, heads=4, layers=1), tokenizer)
    from tests.checkpoint.conftest import tiny_model

    base = tiny_model()
    with pytest.raises(ModelError, match="open_clip cannot be saved"):
        save_model(Model(base.unet, base.vae, OpenClipText(tower, tokenizer), base.schedule), tmp_path / "m")
