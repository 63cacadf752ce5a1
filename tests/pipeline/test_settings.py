"""Every setting is checked before a weight is read, and every refusal is one line that names it."""

import math

import pytest
import torch

from ldm.checkpoint import load_model, save_model
from ldm.checkpoint.describe import describe
from ldm.errors import ConfigError, ModelError
from ldm.pipeline import Pipeline, checks, keywords


@pytest.fixture
def no_weights(monkeypatch):
    """Any attempt to load a model fails the test."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("ldm.pipeline.engine.load_model", refuse)


BAD_CALLS = {
    "sampler": ({"sampler": "eular"}, "did you mean 'euler'"),
    "no such sampler": ({"sampler": 7}, "sampler"),
    "spacing": ({"spacing": "trailling"}, "did you mean 'trailing'"),
    "size": ({"width": 100}, "width: 100 is not a multiple of 8; use 96 or 104"),
    "small size": ({"height": 3}, "use 8"),
    "zero size": ({"height": 0}, "height: 0 is outside"),
    "negative size": ({"height": -8}, "height: -8 is outside"),
    "huge size": ({"width": 80_000}, "width: 80000 is outside"),
    "nan": ({"guidance_scale": math.nan}, "guidance_scale: nan is not a finite number"),
    "infinity": ({"guidance_scale": math.inf}, "not a finite number"),
    "negative guidance": ({"guidance_scale": -1}, "outside 0 to"),
    "guidance text": ({"guidance_scale": "7"}, "expected a number"),
    "zero steps": ({"num_inference_steps": 0}, "num_inference_steps: 0 is outside 1 to"),
    "too many steps": ({"num_inference_steps": 10_001}, "10001 is outside"),
    "half a step": ({"num_inference_steps": 2.5}, "expected a whole number, got 2.5"),
    "true": ({"num_images": True}, "num_images: expected a whole number, got True"),
    "no images": ({"num_images": 0}, "num_images: 0 is outside"),
    "no batch": ({"batch_size": 0}, "batch_size: 0 is outside"),
    "seed below -1": ({"seed": -2}, "seed: -2 is outside"),
    "huge seed": ({"seed": 2**64}, "outside"),
    "seed text": ({"seed": "7"}, "seed: expected a whole number, got '7'"),
    "seed count": ({"seed": [1, 2, 3], "num_images": 2}, "3 seeds for 2 images"),
    "no seeds": ({"seed": []}, "0 seeds"),
    "misspelt": ({"guidence_scale": 3}, "did you mean 'guidance_scale'"),
    "twice": ({"steps": 3, "num_inference_steps": 4}, "steps and num_inference_steps are the same setting"),
    "elsewhere": ({"negative_prompt": "x"}, r"belongs to Pipeline\(...\)"),
    "image": ({"image": "old.png"}, "image: 'old.png': no such image"),
    "mask": ({"mask": "mask.png"}, "mask_image: a mask needs an image"),
    "strength": ({"denoising_strength": 0.5}, "strength needs an image"),
    "lora": ({"lora": "x.safetensors"}, r"belongs to Pipeline\(...\)"),
    "clip skip": ({"clip_skip": -1}, "clip_skip: -1 is outside 0 to 100"),
    "clip skip of too many": ({"clip_skip": 2}, "clip_skip 2 is impossible: the text encoder has 2 layers"),
    "a level without attention": ({"guidance": "pag", "pag_layers": ["down.7"]}, "pag_layers: no self-attention in"),
    "emphasis": ({"emphasis": "no_norms"}, "emphasis: unknown emphasis 'no_norms'; did you mean 'no_norm'"),
    "strict": ({"strict": 1}, "strict: expected True or False"),
    "sigmas and timesteps": ({"sigmas": [3, 1], "timesteps": [900, 5]}, "either timesteps or sigmas"),
    "sigmas that rise": ({"sigmas": [1, 3]}, "lower than the one before"),
    "timesteps beyond": ({"timesteps": [1000, 5]}, "is not inside 0 to 999"),
    "sigmas of words": ({"sigmas": "many"}, "sigmas: expected a list of numbers"),
    "sigmas and a spacing": ({"sigmas": [3, 1], "spacing": "karras"}, "spacing 'karras' chooses the noise levels too"),
    "a sigma of 0 alone": ({"sigmas": [0.0]}, "sigmas: 0 noise levels are outside 1 to 1000"),
    "sigmas and steps": ({"sigmas": [3, 1, 0], "steps": 3}, "2 of them for 3 steps"),
    "eta": ({"eta": 1.5}, "eta: expected a number from 0 to 1"),
    "eta of another": ({"eta": 0.5, "sampler": "euler"}, "eta: the sampler euler takes no eta"),
    "kind of guidance": ({"guidance": "apgg"}, "guidance: unknown guidance 'apgg'; did you mean 'apg'"),
    "option of another": ({"apg_eta": 0.5}, "apg_eta: belongs to guidance 'apg', not 'cfg'"),
    "scales": ({"guidance_scale": [1.0, 2.0]}, "guidance_scale: 2 scales for 1 images"),
    "interval": ({"guidance_interval": (0.8, 0.2)}, "guidance_interval: 0.8 is not below 0.2"),
    "two spacings": ({"sampler": "DPM++ 2M Karras", "spacing": "beta"}, "spacing: "),
    "of flow models": ({"sampler": "heun_flow"}, "sampler: heun_flow is for flow models"),
    "callback": ({"callback": 3}, "callback: expected a function"),
    "latents": ({"latents": [1, 2]}, "latents: expected a tensor, got list"),
    "latents shape": ({"latents": torch.zeros(2, 4, 4, 4)}, "for 1 images, got"),
    "latents nan": ({"latents": torch.full((1, 4, 4, 4), math.nan)}, "NaN"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused_before_weights(name, tiny_folder, no_weights):
    keywords, message = BAD_CALLS[name]
    pipe = Pipeline("a cat", model=tiny_folder)
    with pytest.raises(ConfigError, match=message) as caught:
        pipe.generate(**keywords)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a zebra", "prompt: words that the model was never shown: zebra; change the prompt"),
        ("a (cat", r"prompt: the bracket at '\(cat' is not closed"),
    ],
)
def test_strict_refuses_prompts_before_weights(prompt, message, tiny_folder, tmp_path, no_weights):
    """Of a folder, and of a single file."""
    save_model(load_model(tiny_folder, "cpu", "fp32", cache=False), tmp_path / "m.safetensors", dtype="fp32")
    for model in (tiny_folder, tmp_path / "m.safetensors"):
        with pytest.raises(ConfigError, match=message):
            Pipeline(prompt, model=model).generate(strict=True)


BAD_PIPELINES = {
    "none": ({"prompt": None}, "prompt: expected a text or a list of texts, got None"),
    "number": ({"prompt": 7}, "expected a text"),
    "empty list": ({"prompt": []}, "prompt: the list is empty"),
    "none inside": ({"prompt": ["a", None]}, r"prompt\[1\]: expected a text, got None"),
    "control character": ({"prompt": "a\x07cat"}, r"control character U\+0007 at position 1"),
    "carriage return": ({"prompt": ["ok", "a\rb"]}, r"prompt\[1\]: control character U\+000D"),
    "half a surrogate": ({"prompt": "a\ud800"}, r"U\+D800"),
    "too long": ({"prompt": "x" * 100_001}, "100,001 characters are more than 100,000"),
    "negative count": ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "negative_prompt: 1 texts for 2 prompts"),
    "misspelt": ({"negativ_prompt": "x"}, "did you mean 'negative_prompt'"),
    "elsewhere": ({"steps": 3}, r"belongs to generate\(...\)"),
    "device": ({"device": "gpu"}, "unknown device 'gpu'"),
    "dtype": ({"dtype": "float8"}, "unknown dtype 'float8'"),
    "fp16 on a CPU": ({"dtype": "fp16", "device": "cpu"}, "fp16 is not supported on a CPU"),
    "lora kind": ({"lora": 3}, "lora: expected a path"),
    "lora weight": ({"lora": ("x.safetensors", math.nan)}, "not a finite number"),
    "lora name": ({"lora": [("", 1.0)]}, "expected a path, or"),
    "lora folder": ({"prompt": "a <lora:x:1> cat"}, "no folder to look in; give lora_dir"),
    "lora tag": ({"prompt": "a <lora:x:1 cat"}, "tag is not closed"),
    "lora tag's weight": ({"prompt": "<lora:x:1:2:8>", "lora_dir": "."}, "has no name or no number"),
    "other networks' tag": ({"prompt": "a cat <hypernet:x:1>"}, "hypernetworks are not supported"),
    "dora scaling": ({"dora_scaling": "kohya"}, "dora_scaling: expected linear or peft, got 'kohya'"),
    "lora tag in the wrong place": ({"negative_prompt": "<lora:x>"}, "negative_prompt: a <lora:…> tag belongs"),
    "lora dir": ({"prompt": "<lora:x>", "lora_dir": "/nowhere"}, "lora_dir /nowhere: no such folder"),
    "allow": ({"allow_unapplied": "no"}, "allow_unapplied: expected True or False"),
    "model kind": ({"model": 3}, "expected a name, a path or a loaded model, got int"),
    "vae kind": ({"vae": 3}, "vae: expected a folder"),
}


@pytest.mark.parametrize("name", BAD_PIPELINES)
def test_bad_pipelines_are_refused_before_weights(name, tiny_folder, no_weights):
    keywords, message = BAD_PIPELINES[name]
    with pytest.raises(ConfigError, match=message) as caught:
        Pipeline(**{"prompt": "a cat", "model": tiny_folder, **keywords})
    assert "\n" not in str(caught.value)


def test_missing_and_foreign_models_are_refused(tmp_path, tiny_folder, no_weights):
    with pytest.raises(ModelError, match="no such model folder"):
        Pipeline("a cat", model=tmp_path / "nothing")
    for odd, said in (("~nobody-of-this-name/x", "no such model folder"), ("x" * 5000, "cannot be a path")):
        with pytest.raises(ModelError, match=said):
            Pipeline("a cat", model=odd)
    (tmp_path / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ModelError, match="pickle"):
        Pipeline("a cat", model=tmp_path / "old.ckpt")
    with pytest.raises(ModelError, match="no such VAE"):
        Pipeline("a cat", model=tiny_folder, vae=tmp_path / "nothing")


@pytest.mark.parametrize("prompt", ["", "🐱 猫 кошка", "two\nlines\tand a tab", "x" * 100_000, "a cat's <eye>, --n 3"])
def test_valid_prompts_are_taken(prompt, tiny_folder):
    assert Pipeline(prompt, model=tiny_folder).prompts == (prompt,)


def test_windows_line_ends_are_line_ends(tiny_folder):
    assert Pipeline(["a\r\nb", "c"], model=tiny_folder).prompts == ("a\nb", "c")


def test_emoji_are_read_by_their_names_where_the_model_knows_words_alone(tiny_folder, capsys):
    """The tiny model knows neither emoji nor "face"; the metadata keeps the prompt as it was typed."""
    fast = {"num_inference_steps": 1, "sampler": "ddim", "seed": 1}
    named, spelt = (Pipeline(p, model=tiny_folder).generate(**fast) for p in ("a 🐱 on red", "a cat face on red"))
    assert named[0].tobytes() == spelt[0].tobytes() and named.metadata[0]["prompt"] == "a 🐱 on red"
    assert named.metadata[0]["named"] == {"🐱": "cat face"} and named.metadata[0]["unknown_words"] == ["face"]
    assert "🐱 is read as 'cat face'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="words that the model was never shown: ★"):
        Pipeline("★ cat", model=tiny_folder).generate(strict=True)


def test_the_factor_comes_from_the_model(changed_folder, no_weights):
    folder = changed_folder("vae/config.json", {"block_out_channels": [8, 8]})
    assert describe(folder).factor == 2
    with pytest.raises(ConfigError, match="7 is not a multiple of 2; use 6 or 8"):
        Pipeline("a cat", model=folder).generate(width=7)


def test_steps_that_the_schedule_cannot_take_are_refused_before_weights(changed_folder, no_weights):
    pipe = Pipeline("a cat", model=changed_folder("scheduler/scheduler_config.json", {"num_train_timesteps": 20}))
    with pytest.raises(ConfigError, match="21 steps"):
        pipe.generate(num_inference_steps=21, sampler="euler")


def test_seeds():
    check = checks.check_seeds
    assert check(3, 7, prompts=2) == (3, (7, 8, 9, 7, 8, 9))
    assert check(None, 0, prompts=1) == (1, (0,))
    assert check(None, [5, 5, 1], prompts=1) == (3, (5, 5, 1))
    assert check(None, [5, 6], prompts=2) == (1, (5, 6))
    assert check(2, (1, 2, 3, 4), prompts=2) == (2, (1, 2, 3, 4))
    assert check(1, torch.Generator().manual_seed(11), prompts=1) == (1, (11,))
    for drawn in (None, -1):
        first, second = check(4, drawn, 1)[1], check(4, drawn, 1)[1]
        assert first != second
        assert list(first) == list(range(first[0], first[0] + 4)) and first[3] < 2**32
    used = torch.Generator().manual_seed(11)
    torch.randn(1, generator=used)
    with pytest.raises(ConfigError, match="used before"):
        check(1, used, prompts=1)


def test_every_alias_leads_to_a_setting(tiny_folder):
    own = {*keywords.DEFAULTS, *(name for name in keywords.UNSUPPORTED)}
    own |= {"num_images", "seed", "num_inference_steps", "guidance_scale", "sampler", "spacing"}
    own |= {"width", "height", "eta", "callback", *keywords.EDITING_WORDS, *keywords.CONTROL_WORDS}
    assert set(keywords.ALIASES.values()) <= own
    assert not set(keywords.ALIASES) & own


def test_words_of_other_tools_are_the_same_settings():
    ours = dict.fromkeys(["num_images", "seed", "num_inference_steps", "guidance_scale", "sampler", "width"])
    theirs = {"num_images_per_prompt": 2, "steps": 5, "cfg_scale": 3, "sampler_name": "DPM++ 2M", "W": 64}
    theirs |= {"output_type": "pil", "return_dict": True}
    found = keywords.resolve_aliases(theirs, ours)
    assert found == {**ours, "num_images": 2, "num_inference_steps": 5, "guidance_scale": 3, "width": 64} | {
        "sampler": "DPM++ 2M"
    }


def test_a_joined_label_gives_sampler_and_spacing():
    assert checks.check_sampler({"sampler": "DPM++ 2M Karras"}) == ("dpmpp_2m", "karras")
    assert checks.check_sampler({"sampler": "Euler a", "spacing": "SGM Uniform"}) == ("euler_ancestral", "sgm_uniform")
    assert checks.check_sampler({"spacing": "Automatic"}) == (None, None)


@pytest.mark.parametrize("dtype", ["float32", "torch.float32", torch.float32])
def test_everybodys_name_of_a_dtype(dtype, tiny_folder):
    assert Pipeline("a cat", model=tiny_folder, device="cpu", dtype=dtype).dtype == torch.float32
