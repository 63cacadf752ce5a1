"""The autoencoder and the text encoder of a new U-Net from wherever they are: folders, files, repositories, pairs."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ldm
from ldm.checkpoint.parts import find_text, find_vae
from ldm.checkpoint.vocabulary import clip_tokenizer
from ldm.cli import main
from ldm.errors import CheckpointError, ModelError
from ldm.nn.text import T5Text, XLText
from ldm.training import train
from tests.checkpoint import test_t5
from tests.checkpoint.test_hub_models import COMMIT, LATER, cache, hub  # noqa: F401
from tests.conftest import MAX_LENGTH, tiny_tokenizer, tiny_vae
from tests.training.conftest import SCHEDULE, threads
from tests.training.test_stages import COMMON, picture_folder

SMALL_UNET = {"block_out_channels": [16, 32], "layers_per_block": 1, "transformer_layers": [0, 1], "num_heads": [2, 4]}
SMALL_UNET |= {"norm_num_groups": 8}
SETTINGS = {"stage": "unet", "steps": 2, "latent_pool": 256, "renew": 0, "sample_steps": 1, "schedule": SCHEDULE}
SETTINGS |= {**COMMON, "validation": 2, "model": SMALL_UNET}


def clip(kind, width=32, seed=0, **settings):
    import transformers

    tokenizer = tiny_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=settings.pop("vocab_size", len(tokenizer)),
        hidden_size=width,
        intermediate_size=settings.pop("mlp", 2 * width),
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=24,
        max_position_embeddings=settings.pop("length", MAX_LENGTH),
        eos_token_id=settings.pop("eos_token_id", tokenizer.eos_token_id),
        **settings,
    )
    torch.manual_seed(seed)
    return getattr(transformers, kind)(config).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with bare parts, each as its library saves it."""
    root = tmp_path_factory.mktemp("made")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny_vae().module.save_pretrained(root / "vae")
        clip("CLIPTextModel").save_pretrained(root / "clip")
        clip("CLIPTextModelWithProjection", 24, seed=1).save_pretrained(root / "second")
        test_t5.encoder().save_pretrained(root / "t5")
    test_t5.tokenizer().save_pretrained(root / "t5")
    tiny_tokenizer().save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "second" / "tokenizer")
    picture_folder(root / "pictures", 3)
    (root / "unet.json").write_text(json.dumps(SETTINGS))
    return root


def trained(made, out, *words, **options):
    with threads(1):
        return train(made / "unet.json", out, [f"data={made / 'pictures'}", f"vae={made / 'vae'}", *words], **options)


@pytest.fixture(scope="module")
def models(made, tmp_path_factory):
    """A model for each kind of text encoder, after two steps."""
    runs = tmp_path_factory.mktemp("runs")
    pair = [f"text={made / 'clip'}", f"text_2={made / 'second'}", "model.addition_time_embed_dim=8"]
    words = {"clip": [f"text={made / 'clip'}"], "t5": [f"text={made / 't5'}"], "pair": pair}
    return {name: trained(made, runs / name, *given) for name, given in words.items()}


def same_image(model, pipe):
    """Whether ours and diffusers' draw the same, to rounding."""
    settings, size = {"num_inference_steps": 3, "guidance_scale": 3.0}, {"height": 32, "width": 32}
    noise = torch.Generator("cpu").manual_seed(7)
    theirs = pipe("a red cat", generator=noise, output_type="np", **size, **settings).images[0]
    (image,) = ldm.Pipeline("a red cat", model=model, dtype="fp32").generate(seed=7, **size, **settings)
    return np.abs(np.asarray(image, float) / 255 - theirs).max() <= 1.5 / 255


def test_a_bare_clip_gives_a_model_that_diffusers_draws_from(models):
    from diffusers import StableDiffusionPipeline

    assert same_image(models["clip"], StableDiffusionPipeline.from_pretrained(models["clip"]))


def test_a_projection_is_left_out_where_diffusers_would_take_it_for_the_states(made):
    part, whole = find_text(str(made / "second")), clip("CLIPTextModelWithProjection", 24, seed=1)
    ids = torch.tensor([[1, 2, tiny_tokenizer().eos_token_id]])
    with torch.no_grad():
        expected = whole(input_ids=ids).last_hidden_state
    text = part.load()
    assert type(text.model).__name__ == "CLIPTextModel" and torch.allclose(text.states(ids).states, expected, atol=1e-6)


def test_two_encoders_give_a_model_of_xl_that_diffusers_draws_from(models):
    from diffusers import StableDiffusionXLPipeline

    config = json.loads((models["pair"] / "unet/config.json").read_text())
    assert config["addition_embed_type"] == "text_time" and config["cross_attention_dim"] == 32 + 24
    assert config["projection_class_embeddings_input_dim"] == 6 * 8 + 24
    assert same_image(models["pair"], StableDiffusionXLPipeline.from_pretrained(models["pair"]))
    assert isinstance(find_text(str(models["pair"].parent)).load(), XLText)


def test_a_bare_t5_gives_a_model_that_is_drawn_from(models):
    (image,) = ldm.Pipeline("a red cat", model=models["t5"]).generate(num_inference_steps=1, seed=0)
    assert image.size == (32, 32) and isinstance(find_text(str(models["t5"])).load(), T5Text)
    assert "our class" in (models["t5"] / "README.md").read_text()


def test_texts_together_are_the_texts_alone(models):
    text, texts = find_text(str(models["pair"])).load(), ["a red cat", None, "", "a dog"]
    assert not text.zero_empty and torch.equal(*text.encode(["", None]).states)
    text = XLText(text.first, text.second, zero_empty=True)
    together, alone = text.encode_together(texts), text.encode(texts)
    assert torch.allclose(together.states, alone.states, atol=1e-5) and not together.states[1].any()
    assert torch.allclose(together.pooled, alone.pooled, atol=1e-5) and not together.pooled[1].any()


def test_a_repository_is_pinned_recorded_and_fetched_in_part(made, hub, tmp_path):  # noqa: F811
    folder = tmp_path / "served"
    shutil.copytree(made / "vae", folder / "vae")
    shutil.copytree(made / "clip", folder / "encoders" / "text_encoder")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "encoders" / "tokenizer").mkdir(exist_ok=True)
        (folder / "encoders" / "text_encoder" / file).rename(folder / "encoders" / "tokenizer" / file)
    (folder / "unet").mkdir()
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"large")
    hub.repositories["someone/parts"] = {COMMIT: folder}
    words = ["vae=someone/parts", "text=someone/parts", "text_subfolder=encoders/text_encoder"]
    model = trained(made, tmp_path / "run", *words)
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["vae"] == settings["text"] == f"someone/parts@{COMMIT}"
    inputs = json.loads((tmp_path / "run/versions.json").read_text())["inputs"]
    assert inputs["vae"] == inputs["text"] == COMMIT
    assert not any("unet" in path for _, path, _ in hub.asked)
    assert ldm.Pipeline("a cat", model=model).generate(num_inference_steps=1)[0].size == (32, 32)
    later = shutil.copytree(folder, tmp_path / "later")
    hub.repositories["someone/parts"][LATER] = later
    ldm.checkpoint.clear_cache()
    with pytest.raises(CheckpointError, match=f"{COMMIT} → someone/parts@{LATER}"):
        trained(made, tmp_path / "run", *words, "steps=3", resume="latest")
    trained(made, tmp_path / "run", *words[2:], *(f"{w}@{COMMIT}" for w in words[:2]), "steps=3", resume="latest")


def test_a_whole_clip_and_a_tower_of_open_clip_give_their_text_encoder(tmp_path):
    sizes = {"vocab_size": 49408, "length": 77, "mlp": 128, "eos_token_id": 49407}
    model = clip("CLIPTextModelWithProjection", hidden_act="gelu", **sizes)
    state = {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}
    whole = {name if "projection" in name else f"text_model.{name}": tensor for name, tensor in state.items()}
    save(tmp_path / "whole", "model", {**whole, "vision_model.x": torch.ones(1), "logit_scale": torch.ones(())})
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "text_config": model.config.to_dict()}
    (tmp_path / "whole/config.json").write_text(json.dumps({**config, "projection_dim": 24}))
    save(tmp_path / "open", "open_clip_model", {**open_clip_names(state), "visual.proj": torch.ones(2)})
    text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
    (tmp_path / "open/open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 24, "text_cfg": text_cfg}})
    )
    ids = torch.tensor([[49406, 320, 2368, *[49407] * 74]])
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True)
        norm = getattr(model, "text_model", model).final_layer_norm
    found = find_text(str(tmp_path / "whole")).load().states(ids)
    assert torch.allclose(found.states, expected.last_hidden_state, atol=1e-5)
    found = find_text(str(tmp_path / "open")).load().states(ids)  # without its last layer, as in 2.x
    assert torch.allclose(found.states, norm(expected.hidden_states[1]), atol=1e-5)
    pair = find_text(str(tmp_path / "whole"), second=str(tmp_path / "open"))
    assert pair.width == 64 and pair.pooled == 24
    assert torch.allclose(pair.load().second.states(ids, 1, False).pooled, expected.text_embeds, atol=1e-5)
    padded = clip_tokenizer("!")(["a cat"], padding="max_length").input_ids
    assert pair.load().second.tokenize(["a cat"]).tolist() == padded


def save(folder, stem, state):
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / f"{stem}.safetensors")


def open_clip_names(state):
    """transformers' tensors under open_clip's names, by a list of this test's own."""
    found = {"token_embedding.weight": state["embeddings.token_embedding.weight"]}
    found |= {"positional_embedding": state["embeddings.position_embedding.weight"]}
    found |= {"text_projection": state["text_projection.weight"].T}
    for kind in ("weight", "bias"):
        found[f"ln_final.{kind}"] = state[f"final_layer_norm.{kind}"]
        for i in range(2):
            old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [state[f"{old}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{new}.attn.in_proj_{kind}"] = torch.cat(parts)
            names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
            names |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
            found |= {f"{new}.{a}.{kind}": state[f"{old}.{b}.{kind}"] for a, b in names.items()}
    return found


def test_the_autoencoder_in_a_single_file(made, tiny_folder, tmp_path):
    from ldm.checkpoint.convert import convert

    file = tmp_path / "whole.safetensors"
    convert(tiny_folder, file)
    part = find_vae(str(file))
    assert (part.latent_channels, part.factor) == (4, 8)
    expected = find_vae(str(tiny_folder)).load().module.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in part.load().module.state_dict().items())


@pytest.mark.parametrize("names", ["diffusers'", "original"])
def test_an_autoencoder_alone_in_a_file_is_of_any_size(names, made, tmp_path):
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    from ldm.checkpoint.single.names import vae_modules

    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 6, "use_quant_conv": False}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    whole = AutoencoderKL(**sizes, **kinds, use_post_quant_conv=False, mid_block_add_attention=False)
    state, file = whole.state_dict(), tmp_path / "alone.safetensors"
    if names == "original":
        modules = {new: old for old, new in vae_modules(sizes).items()}
        longest = {name: max((m for m in modules if name.startswith(f"{m}.")), key=len) for name in state}
        state = {modules[longest[name]] + name[len(longest[name]) :]: tensor for name, tensor in state.items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    with pytest.raises(
        ModelError, match=r"another size .*\(6 latent channels, widths \[32, 64\]\).* vae_scaling_factor"
    ):
        find_vae(str(file))
    part = find_vae(str(file), scale=0.4)
    assert (part.latent_channels, part.factor) == (6, 2) and part.fingerprint != find_vae(
        str(file), scale=0.5
    ).fingerprint
    loaded = part.load()
    assert loaded.scaling_factor == 0.4
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in loaded.module.state_dict().items())
    if names == "original":
        return
    words = [f"vae={file}", f"text={made / 'clip'}", "vae_scaling_factor=0.4", "data.resolution=16"]
    model = trained(made, tmp_path / "run", *words)
    config = json.loads((model / "vae/config.json").read_text())
    assert config["scaling_factor"] == 0.4 and load_file(model / "unet/diffusion_pytorch_model.safetensors")
    assert ldm.Pipeline("a cat", model=model).generate(num_inference_steps=1)[0].size == (16, 16)
    with pytest.raises(ModelError, match=r"vae_scaling_factor: is 2, and the settings of .* say 0.5; leave it out"):
        trained(made, tmp_path / "other", f"text={made / 'clip'}", "vae_scaling_factor=2")


def test_what_does_not_fit_is_one_line_before_any_work(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("empty", "word", "pickle", "bert", "long", "bare"):
        shutil.copytree(made / "clip", tmp_path / name)
    (tmp_path / "empty/tokenizer.json").unlink()  # tokenizer_config.json stays
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    (tmp_path / "pickle/model.safetensors").rename(tmp_path / "pickle/pytorch_model.bin")
    change(tmp_path / "bert", architectures=["BertModel"], model_type="bert")
    change(tmp_path / "long", hidden_size=64)
    change(tmp_path / "word", vocab_size=99)
    vae, clip, second = (f"{name}={made / folder}" for name, folder in zip(("vae", "text", "text_2"), FOLDERS))
    cases = {
        (vae, f"text={tmp_path / 'empty'}"): "empty: no vocab.json and merges.txt, nor tokenizer.json",
        (vae, f"text={tmp_path / 'bare'}"): "bare: has no tokenizer inside or beside it",
        (vae, f"text={tmp_path / 'pickle'}"): "is a pickle file by its name",
        (vae, f"text={tmp_path / 'bert'}"): "is of class BertModel, which is no text encoder",
        (vae, f"text={tmp_path / 'long'}"): "long",
        (vae, f"text={tmp_path / 'word'}"): "word",
        (vae, f"text={made / 'vae'}"): "is of class AutoencoderKL, which is no text encoder",
        (f"vae={made / 'clip'}", clip): "is of class CLIPTextModel, and an autoencoder is AutoencoderKL",
        (vae, clip, f"text_2={made / 't5'}"): "is T5, and two text encoders are CLIP's",
        (vae, clip, f"text_2={made / 'clip'}"): "has no projection",
        (vae, clip, "text_subfolder=nothing"): "has no folder 'nothing'; its folders: none",
        (vae, clip, "model.cross_attention_dim=768"): "model.cross_attention_dim: asks for 768, but the text of",
        (vae, clip, "model.in_channels=9"): "model.in_channels: asks for 9, but the autoencoder",
        (vae, clip, "model.addition_embed_type=text_time"): "text_time needs two text encoders",
        (
            vae,
            clip,
            second,
            "model.addition_embed_type=text",
        ): "asks for text, but two text encoders make a model",
        (vae, clip, "data.resolution=36"): "36 is not a multiple of the step 8",
        ("vae=nobody/here", clip): "nobody/here",
    }
    for words, said in cases.items():
        code = main(
            ["train", str(made / "unet.json"), "-o", str(tmp_path / "run"), f"data={made / 'pictures'}", *words]
        )
        error = capsys.readouterr().err
        assert code == 2 and said in error and error.count("\n") == 1, (words, error)
        assert not (tmp_path / "run").exists(), words


FOLDERS = ("vae", "clip", "second")


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
