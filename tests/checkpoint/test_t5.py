"""T5 as a text encoder: its states and mask, folders of our own class, training, and what diffusers says to them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from ldm import Pipeline
from ldm.checkpoint import Model, check_model, load_model, save_model
from ldm.checkpoint.convert import convert
from ldm.checkpoint.describe import describe
from ldm.checkpoint.parts import load_text_from
from ldm.errors import ConfigError, ModelError
from ldm.nn.text import T5Text
from ldm.nn.unet import UNet
from ldm.training import train
from tests.checkpoint.conftest import tiny_model
from tests.training.conftest import SCHEDULE, TINY_UNET, threads
from tests.training.test_stages import picture_folder

WORDS = ["a", "cat", "dog", "red", "blue", "on", "and", "card"]
LENGTH = 8


def tokenizer(length=LENGTH):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **special)


def encoder(width=32):
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(3)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    ids = {"vocab_size": 16, "pad_token_id": 0, "eos_token_id": 1}
    model = T5EncoderModel(T5Config(**sizes, **ids, feed_forward_proj="gated-gelu")).eval()
    model.shared.weight.data.normal_(0, 1)
    return model


@pytest.fixture(scope="module")
def text():
    return T5Text(encoder(), tokenizer())


@pytest.fixture(scope="module")
def model(text):
    base = tiny_model()
    torch.manual_seed(1)
    return Model(UNet(base.unet.config).eval(), base.vae, text, base.schedule, "t5")


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("t5") / "t5", dtype="fp32")


def test_states_are_the_models_and_end_with_the_text(text):
    texts = ["a red cat", "a dog", "", None, "a dog"]
    found = text.encode(texts)
    assert found.mask.sum(1).tolist() == [4, 3, 1, 1, 3] and found.pooled is None and not found.states.requires_grad
    assert found.states.shape == (5, LENGTH, text.width)
    with torch.no_grad():  # without any padding
        expected = text.model(input_ids=torch.tensor([[3, 6, 4, 1]])).last_hidden_state
    assert torch.allclose(found.states[0, :4], expected[0], atol=1e-5) and not found.states[0, 4:].any()
    assert torch.equal(found.states[2], found.states[3])
    alone = text.encode(["a dog"])
    assert torch.equal(alone.states[0], found.states[1]) and torch.equal(found.states[4], found.states[1])
    assert torch.allclose(text.encode_together(texts[:3]).states, found.states[:3], atol=1e-5)


def test_what_t5_does_not_see_is_told(text):
    assert text.truncated("a red cat") == "" and text.truncated("a red cat on a blue card and a dog") == "and a dog"
    assert text.unknown_words("A zebra and a cat, two zebra") == ["zebra", "two"]
    with pytest.raises(ConfigError, match="clip_skip 1 is impossible"):
        text.encode(["a cat"], clip_skip=1)
    assert T5Text(text.model, tokenizer(10**30)).max_length == 512


def test_a_tokenizer_of_another_model_is_refused(text):
    other = tokenizer()
    other.eos_token = "<unk>"
    with pytest.raises(ModelError, match="eos_token_id is 1 for the text encoder and 2 for the tokenizer"):
        T5Text(text.model, other)
    many = tokenizer()
    many.add_tokens([f"word{i}" for i in range(9)])
    with pytest.raises(ModelError, match="tokens, the text encoder only 16"):
        T5Text(text.model, many)


def test_what_follows_the_text_does_not_reach_the_image(model):
    """Neither through attention nor through the text in the time embedding."""
    cond = model.text.encode(["a red cat", "a dog"])
    changed = torch.where(cond.mask[..., None], cond.states, torch.randn_like(cond.states))
    x, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        one, other = (model.unet(x, timesteps, states, mask=cond.mask) for states in (cond.states, changed))
        short = model.unet(x[1:], timesteps[1:], cond.states[1:, :3])  # as if there were nothing
        unmasked = model.unet(x, timesteps, changed)
    assert torch.allclose(one, other, atol=1e-6) and not torch.allclose(one, unmasked, atol=1e-3)
    assert torch.allclose(one[1:], short, atol=1e-5)


def draw(model, prompts, **other):
    pipe = Pipeline(prompts, model, negative_prompt="a blue dog", **other)
    images = pipe.generate(num_inference_steps=3, guidance_scale=4, seed=5)
    return np.stack([np.asarray(image) for image in images]), images


def test_a_saved_folder_loads_and_draws_the_same(model, folder):
    assert check_model(folder) == folder
    again = load_model(folder, "cpu", "fp32", cache=False)
    assert isinstance(again.text, T5Text) and again.info["layout"].startswith("diffusers layout, our class")
    pairs = list(zip(model.text.model.state_dict().items(), again.text.model.state_dict().items(), strict=True))
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)
    assert not any(t.is_meta for t in (*again.text.model.parameters(), *again.text.model.buffers()))
    pixels, images = draw(folder, ["a red cat", "a dog", "a zebra"], device="cpu", dtype="fp32")
    assert np.array_equal(pixels, draw(model, ["a red cat", "a dog", "a zebra"])[0])
    assert np.array_equal(pixels[1:2], draw(again, ["a dog"])[0])
    assert np.abs(pixels[0].astype(int) - pixels[1]).max() > 5  # the words reach the image
    assert images.metadata[2]["unknown_words"] == ["zebra"]
    saved = save_model(again, folder.parent / "again", dtype="fp32")
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(saved) for path in saved.rglob("*") if path.is_file())
    assert [name for name in names if (folder / name).read_bytes() != (saved / name).read_bytes()] == []


def test_a_description_knows_t5_in_a_folder_and_in_a_single_file(folder, tmp_path):
    """It has no layers that --clip-skip could leave out."""
    file = convert(folder, tmp_path / "m.safetensors")
    for path in (folder, file):
        assert describe(path, hashed=True) == describe(load_model(path, "cpu", "fp32", cache=False))
        assert describe(path).clip_layers == ()


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a (cat:1.2)", {}, "prompt: emphasis and BREAK are CLIP's"),
        ("a [cat:(dog):2]", {}, "prompt: emphasis and BREAK are CLIP's"),
        ("a cat", {"clip_skip": 1}, "clip_skip: clip_skip 1 is impossible: the text encoder is T5"),
    ],
)
def test_what_t5_cannot_do_is_refused_before_weights(folder, prompt, settings, message, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("ldm.pipeline.engine.load_model", refuse)
    with pytest.raises(ConfigError, match=message):
        Pipeline(prompt, folder, device="cpu", dtype="fp32").generate(num_inference_steps=3, **settings)


def test_an_image_tells_what_t5_did_not_see(model):
    _, images = draw(model, ["a red cat on a blue card and a dog"])
    assert images.metadata[0]["truncated"] == "and a dog"


def test_transformers_reads_the_encoder_and_the_tokenizer(text, folder):
    from transformers import AutoTokenizer, T5EncoderModel

    read = T5EncoderModel.from_pretrained(folder / "text_encoder", local_files_only=True)
    words = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    ids = words("a red zebra", return_tensors="pt").input_ids
    assert ids.tolist() == [[3, 6, 2, 1]] and words.model_max_length == LENGTH
    with torch.no_grad():
        states = read(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(states, text.encode(["a red zebra"]).states[0, :4], atol=1e-5)


def test_diffusers_refuses_the_folder_instead_of_misreading_it(folder):
    """Its StableDiffusionPipeline would take any encoder and leave the mask out."""
    import diffusers

    with pytest.raises(AttributeError, match="LdmT5Pipeline"):
        diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    with pytest.raises((ValueError, ImportError), match=r"T5Text|ldm"):
        diffusers.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("name", ["text_encoder/model.safetensors", "tokenizer/tokenizer.json"])
def test_other_forms_of_the_folder(folder, tmp_path, name):
    """T5 under diffusers' own names, the word table under its second name; and no tokenizer.json is told."""
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "t5")
    (copy / "manifest.json").unlink()
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "T5EncoderModel"]}
    (copy / "model_index.json").write_text(json.dumps(index))
    if name.startswith("tokenizer"):
        (copy / name).unlink()
        with pytest.raises(ModelError, match=r"tokenizer: no tokenizer.json; .*spiece.model"):
            check_model(copy)
        return
    state = load_file(copy / name)
    assert "shared.weight" in state and "encoder.embed_tokens.weight" not in state
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, copy / name)
    one, other = (load_model(path, "cpu", "fp32", cache=False) for path in (folder, copy))
    assert torch.equal(one.text.encode(["a cat"]).states, other.text.encode(["a cat"]).states)
    assert one.info["layout"] == other.info["layout"]


def test_the_unet_trains_on_t5_and_the_run_draws(model, folder, tmp_path):
    settings = {
        "stage": "unet",
        "steps": 2,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "workers": 0,
        "precision": "fp32",
        "device": "cpu",
        "warmup": 1,
        "caption_dropout": 0.5,
        "latent_pool": 256,
        "validation": 4,
        "sample_steps": 2,
        "vae": str(folder),
        "text": str(folder),
        "data": {"resolution": 32, "folder": str(picture_folder(tmp_path / "images", 8))},
        "schedule": SCHEDULE,
        "model": TINY_UNET,
    }
    (tmp_path / "unet.json").write_text(json.dumps(settings))
    with threads(1):
        train(tmp_path / "unet.json", tmp_path / "run")
    trained = load_model(tmp_path / "run/model", "cpu", "fp32", cache=False)
    assert isinstance(trained.text, T5Text) and isinstance(load_text_from(tmp_path / "run/model"), T5Text)
    expected = model.text.encode(["a cat"]).states
    assert torch.allclose(trained.text.encode(["a cat"]).states, expected, atol=0.05)  # saved in bf16
    pixels, _ = draw(trained, ["a red cat", "a dog"])
    masked = dataclasses.replace(trained, text=Unmasked(trained.text))
    assert pixels.shape == (2, 32, 32, 3) and not np.array_equal(pixels, draw(masked, ["a red cat", "a dog"])[0])


class Unmasked(T5Text):
    """The same encoder with its mask lost."""

    def __init__(self, text):
        vars(self).update(vars(text))

    def encode(self, texts, clip_skip=0):
        return dataclasses.replace(super().encode(texts, clip_skip), mask=None)
