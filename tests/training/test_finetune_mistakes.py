"""What users get wrong: each mistake is said in one line before the first step; mangled input is no traceback."""

import dataclasses
import json
import random
import shutil

import pytest
from PIL import Image
from safetensors.torch import save_file

import ldm.training.loop.loop
from ldm.checkpoint import save_model
from ldm.checkpoint.lora import read_lora
from ldm.cli import main
from ldm.console import hushed
from ldm.errors import ConfigError, LdmError, ModelError
from ldm.nn.text import T5Text
from ldm.nn.unet import UNet
from ldm.training.finetuning.checks import check_finetune
from ldm.training.finetuning.command import finetune
from tests.anew import write_anew
from tests.checkpoint.conftest import tiny_model
from tests.checkpoint.lora_cases import pair
from tests.checkpoint.test_families_folders import build, networks
from tests.checkpoint.test_t5 import encoder, tokenizer
from tests.training.conftest import threads
from tests.training.finetune_cases import pictures, resolved

GOOD = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "resolution": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with all that the mistakes are made with."""
    root = tmp_path_factory.mktemp("mistakes")
    pictures(root / "data", 4)
    for name, suffix, text in (("suffix", ".captoin", "a cat"), ("bare", None, ""), ("empty", ".txt", "")):
        (root / name).mkdir()
        for i in range(3):
            Image.new("RGB", (32, 32), (9, 9, i)).save(root / name / f"{i}.png")
            if suffix:
                (root / name / f"{i}{suffix}").write_text(text)
    (root / "nothing").mkdir()
    (root / "file").write_text("x")
    (root / "other").mkdir()
    (root / "other" / "thesis.txt").write_text("x")
    shutil.copytree(tiny_folder, root / "tiny")
    (root / "model.ckpt").write_bytes(b"\x80\x04}q\x00.")
    (root / "renamed.safetensors").write_bytes(b"\x80\x04}q\x00.")
    save_file(
        pair("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", inputs=768), root / "sd.safetensors"
    )
    save_file(pair("unet.nowhere.to_q"), root / "alien.safetensors")
    good = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(pair(good), root / "good.safetensors")
    save_file({k: v * float("nan") for k, v in pair(good).items()}, root / "nan.safetensors")
    (root / "bad.yaml").write_text("steps: 3\nlora_rank: [1\n")
    (root / "bomb.yaml").write_text("steps: &a [1]\ntargets: *a\n")
    (root / "typo.toml").write_text("lora_rnak = 4\n")
    (root / "both.json").write_text(json.dumps({"train": "full", "lora_rank": 8}))
    (root / "run").mkdir()
    (root / "run" / "settings.json").write_text("{}")
    (root / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    return root


# What is said instead of, or after, `finetune DATA -o RUN --model MODEL`, and what the answer has in it.
MISTAKES = {
    "wrong suffix": ({"data": "suffix"}, [], "captoin"),
    "no caption at all": ({"data": "bare"}, [], "caption"),
    "empty captions": ({"data": "empty"}, [], "caption"),
    "no picture": ({"data": "nothing"}, [], "nothing"),
    "no such data": ({"data": "nowhere"}, [], "no such folder"),
    "a file for data": ({"data": "file"}, [], "is a file"),
    "typo in an option": ({}, ["--lora-rnk", "4"], "did you mean '--lora-rank'"),
    "typo in a key": ({}, ["resolutoin=64"], "did you mean 'resolution'"),
    "typo in a group": ({}, ["data.flop=1"], "did you mean 'flip'"),
    "typo in a file": ({}, ["--config", "{root}/typo.toml"], "did you mean 'lora_rank'"),
    "bad YAML": ({}, ["--config", "{root}/bad.yaml"], "bad.yaml:3"),
    "a YAML bomb": ({}, ["--config", "{root}/bomb.yaml"], "aliases are not allowed"),
    "no such config": ({}, ["--config", "{root}/none.yaml"], "no such settings file"),
    "unknown prediction type": ({}, ["--prediction_type", "v-prediction"], "did you mean 'v_prediction'"),
    "another prediction type": ({}, ["--prediction_type", "epsilon"], "was trained for v_prediction"),
    "flow by LoRA": ({}, ["--prediction-type", "flow"], "a LoRA cannot change"),
    "zero SNR by LoRA": ({}, ["--zero-terminal-snr"], "a LoRA cannot change"),
    "LoRA of another model": ({}, ["--init", "{root}/sd.safetensors"], "cross_attention_dim 768"),
    "LoRA of nothing here": ({}, ["--init", "{root}/alien.safetensors"], "not one of its 1 layers is in this model"),
    "LoRA with NaN": ({}, ["--init", "{root}/nan.safetensors"], "NaN"),
    "no such LoRA": ({}, ["--init", "{root}/none.safetensors"], "none.safetensors"),
    "pickle for a LoRA": ({}, ["--init", "{root}/renamed.safetensors"], "pickle"),
    "another rank than init's": ({}, ["--init", "{root}/good.safetensors", "--rank", "7"], "is 2 in the LoRA"),
    "other layers than init's": ({}, ["--init", "{root}/good.safetensors", "--targets", "to_k"], "targets: are those"),
    "size of no latents": ({}, ["--resolution", "100", "--square"], "100 is not a multiple of the step 8"),
    "bucket step of no latents": ({}, ["bucket_step=4"], "4 is not a multiple of the autoencoder's 8"),
    "steps and epochs": ({}, ["--steps", "5", "--epochs", "2"], "steps and epochs are both given"),
    "fp16 on a CPU": ({}, ["--mixed_precision", "fp16"], "fp16 is for CUDA"),
    "no such device": ({}, ["--device", "cuda:99"], "not available"),
    "unknown layer": ({}, ["--targets", "to_q,to_w"], "no layer named 'to_w'; did you mean 'to_"),
    "rank 0": ({}, ["--network_dim", "0"], "lora_rank: must be at least 1"),
    "alpha 0": ({}, ["--network_alpha", "0"], "lora_alpha: must be positive"),
    "batch 0": ({}, ["--train_batch_size", "0"], "batch_size: must be at least 1"),
    "learning rate NaN": ({}, ["--learning-rate", ".nan"], "learning_rate: nan is not a finite number"),
    "learning rate below 0": ({}, ["--learning-rate=-1e-4"], "learning_rate: must be positive"),
    "learning rate a word": ({}, ["--learning-rate", "fast"], "learning_rate: expected float"),
    "unknown kind": ({}, ["--train", "lokr"], "'lokr' is not allowed"),
    "unknown optimizer": ({}, ["optimizer=prodigy"], "'prodigy' is not allowed"),
    "unknown sampler": ({}, ["sampler=eular"], "did you mean 'euler'"),
    "unknown tracker": ({}, ["--report-to", "tensorbord"], "did you mean 'tensorboard'"),
    "unknown attention": ({}, ["attention=flash9"], "flash9"),
    "LoRA words in a full run": ({}, ["--train", "full", "--lora-rank", "4"], "lora_rank is for LoRA"),
    "LoRA words in a full file": ({}, ["--config", "{root}/both.json"], "lora_rank is for LoRA"),
    "random crops in a cache": ({}, ["--random_crop"], "random crops cannot be cached"),
    "run is a file": ({"out": "file"}, [], "is a file"),
    "run holds other things": ({"out": "other"}, [], "is no run, and holds thesis.txt"),
    "run holds another run": ({"out": "run"}, [], "already holds a run"),
    "run among the pictures": ({"out": "data/run"}, [], "whose images are trained on"),
    "no such model": ({"model": "nowhere"}, [], "no such model folder"),
    "pickle for a model": ({"model": "model.ckpt"}, [], "pickle"),
    "data for a model": ({"model": "data"}, [], "is no model folder"),
    "cache in a file": ({}, ["--cache", "{root}/file/cache"], "is a file, not a folder"),
    "cache is a file": ({}, ["--cache", "{root}/file"], "is a file, not a folder"),
    "run where nothing can be": ({"out": "/proc/x"}, [], "/proc/x: cannot be written"),
    "best of nothing": ({}, ["--export", "best"], "export: best is by the validation loss, and no image is held out"),
    "changed what is not": ({}, ["--resume", "--allow-changed", "resolutoin"], "did you mean 'resolution'"),
    "no prompts file": ({}, ["--sample_prompts", "{root}/none.txt"], "none.txt: cannot be read"),
    "no such prior": ({}, ["--class_data_dir", "{root}/none"], "no such folder"),
    "no such checkpoint": ({}, ["--resume", "{root}/none"], "no such checkpoint"),
    "said twice": ({}, ["--rank", "4", "--lora-rank", "8"], "are the same setting, and differ"),
    "not taken": ({}, ["--push_to_hub"], "nothing is ever uploaded"),
    "not KEY=VALUE": ({}, ["steps", "5"], "unexpected argument 'steps'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_before_the_first_step(name, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ldm.training.loop.loop, "take_step", None)
    where, words, said = MISTAKES[name]
    out = str(place / where["out"]) if "out" in where else str(tmp_path / "run")
    words = [word.format(root=place) for word in words]
    given = [f"{key}={value}" for key, value in GOOD.items() if key not in " ".join(words).replace("-", "_")]
    given = [word for word in given if not word.startswith("steps") or "--epochs" not in words]
    model, data = place / where.get("model", "tiny"), place / where.get("data", "data")
    assert main(["finetune", str(data), "-o", out, "--model", str(model), *words, *given]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and said in error[-1], error[-1]
    assert not any("Traceback" in line for line in error)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_the_text_encoder_is_trained_for_clip_alone(place, tmp_path):
    tiny = tiny_model()
    t5 = dataclasses.replace(tiny, unet=UNet(tiny.unet.config).eval(), text=T5Text(encoder(), tokenizer()))
    save_model(t5, tmp_path / "t5", dtype="fp32")
    with pytest.raises(ConfigError, match="text_encoder: is for CLIP alone, and this model has T5"):
        finetune(place / "data", tmp_path / "run", tmp_path / "t5", text_encoder=True, **GOOD)
    with threads(1):
        out = finetune(place / "data", tmp_path / "run", tmp_path / "t5", targets="attn2.to_k", samples=0, **GOOD)
    assert read_lora(out).header.entries.keys() == {k for k in read_lora(out).header.entries if "attn2.to_k" in k}


def test_inpainting_models_are_refused(place, tmp_path):
    pipe = build("1.5")
    wide, _ = networks(cross_attention_dim=32, attention_head_dim=4, in_channels=9)
    pipe.register_modules(unet=wide)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="takes 9 channels, and gives 4: an inpainting model"):
        finetune(place / "data", tmp_path / "run", tmp_path / "model", **GOOD)


# Mangled settings and metadata

WORDS = ["steps", "lora_rank", "rank", "targets", "data", "resolution", "flip", "epochs", "train", "snr_gamma", "betas"]
WORDS += ["validation_prompts", "report_to", "init", "model", "precision", "mixed_precision", "random_flip", "cache"]
WORDS += ["prompts_file", "prior", "sampler", "warmup", "text_encoder", "data.flip", "network_alpha", "max_bad", "none"]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "é",
    "\x00",
    "a" * 300,
]
VALUES += [
    [],
    [1],
    ["to_q"],
    {},
    {"a": 1},
    [[["x"]]],
    "to_q,to_k",
    "full",
    "dora",
    "/dev/null",
    "../none",
    "off",
    "bf16",
    "~",
    "[",
]
PIECES = ["\x00", "{", "}", "[", ":", "\n", '"', "&a", "*a", "-", "9" * 30, "\ud800", "é"]


def mutated_mapping(chance):
    mapping = dict(GOOD)
    for _ in range(chance.randint(1, 4)):
        word, value = chance.choice(WORDS), chance.choice(VALUES)
        mapping[word] = {chance.choice(WORDS): value} if word == "data" and chance.random() < 0.7 else value
        if chance.random() < 0.2:
            mapping.pop(chance.choice(list(mapping)), None)
    return mapping


def mutated_text(text, chance):
    """The text with some of its characters cut, doubled, swapped or replaced."""
    characters = list(text)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(characters)) if characters else 0
        what = chance.randrange(4)
        if what == 0:
            del characters[at : at + chance.randint(1, 12)]
        elif what == 1:
            characters[at:at] = characters[at : at + chance.randint(1, 8)]
        else:
            characters[at : at + 1] = chance.choice(
                ["\x00", "{", "}", "[", ":", "\n", '"', "&a", "*a", "-", "9" * 30, "\ud800", "é"]
            )
    return "".join(characters)


def try_mangled_settings(root, chance, number):
    """Either settings come out, or an error of ours."""
    suffix = (".json", ".yaml", ".toml")[number % 3]
    mapping = mutated_mapping(chance)
    if suffix == ".toml":
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in mapping.items())
    else:
        text = json.dumps(mapping)
    if number % 2:
        text = mutated_text(text, chance)
    path = root / f"mutant{suffix}"
    write_anew(path, text.encode("utf-8", "surrogatepass"))
    try:
        settings, _ = resolved(root / "data", root / "new", root / "tiny", config=path)
        check_finetune(settings)
        return "good"
    except LdmError as error:
        assert error.exit_code in (2, 3, 4) and "\n" not in str(error)
        return "refused"


def try_mangled_metadata(root, chance, number):
    rows = [{"file_name": f"{i}.png", "text": f"a cat {i}"} for i in range(4)]
    text = mutated_text("\n".join(map(json.dumps, rows)) + "\n", chance)
    write_anew(root / "rows" / "metadata.jsonl", text.encode("utf-8", "surrogatepass"))
    try:
        resolved(root / "rows", root / "new", root / "tiny", max_bad=0.5, **GOOD)
        return "good"
    except LdmError as error:
        assert error.exit_code in (2, 3) and "\n" not in str(error)
        return "refused"


@pytest.fixture
def rows(place):
    """The pictures of the data in an imagefolder with metadata."""
    if not (place / "rows").exists():
        (place / "rows").mkdir()
        for i in range(4):
            shutil.copy(place / "data" / f"{i}.png", place / "rows")
    return place


@pytest.mark.parametrize("kind", ["settings", "metadata"])
@pytest.mark.parametrize(
    "count", [pytest.param(400, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]
)
def test_mangled_input_is_refused_in_our_words(kind, count, rows):
    chance, found = random.Random(f"{kind} {count}"), []
    attempt = try_mangled_settings if kind == "settings" else try_mangled_metadata
    with hushed():
        for number in range(count):
            found.append(attempt(rows, chance, number))
    assert found.count("refused") > count // 10 and found.count("good") > count // 100, found.count("good")
    assert not (rows / "new").exists()
