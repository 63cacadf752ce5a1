"""A VAE and text encoders that are given beside a model's file: drawn with everywhere, and named in the metadata."""

import base64
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ldm
from ldm import Pipeline, render
from ldm.checkpoint import load_model
from ldm.checkpoint.describe import describe
from ldm.checkpoint.memory import memory_of, weight_shapes
from ldm.checkpoint.single import save_single
from ldm.cli import main
from ldm.errors import ConfigError, ModelError
from ldm.images import read_metadata
from ldm.render.replay.replay import differences, keywords, read_replays
from ldm.training.finetuning import base_model
from tests.flow_models import SIDE, build_standard, written_apart
from tests.training.finetune_cases import apart as apart_by
from tests.training.finetune_cases import pictures, run, settings_of

FEW = {"num_inference_steps": 2, "seed": 3, "height": SIDE, "width": SIDE}
PLACE = {"device": "cpu", "dtype": "fp32"}


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """(FLUX.1-dev's transformer, VAE, [CLIP-L, T5, tokenizer], its image of "a cat")."""
    root = tmp_path_factory.mktemp("apart")
    build_standard("flux_dev").save_pretrained(root / "folder")
    model = load_model(root / "folder", "cpu", "fp32", cache=False)
    whole = save_single(model, root / "whole.safetensors", torch.float32)
    (image,) = Pipeline("a cat", model).generate(**FEW)
    return *written_apart(whole, root / "folder", root), np.asarray(image)


def drawn(path):
    return np.asarray(Image.open(path))


def test_an_image_names_its_parts_and_is_drawn_again_with_them(apart, tmp_path):
    flux, vae, texts, image = apart
    found = Pipeline("a cat", flux, vae=vae, text_encoders=texts, **PLACE).generate(**FEW)
    found.save(tmp_path / "cat.png")
    said = read_metadata(tmp_path / "cat.png").ldm
    assert said["vae"] == str(vae) and said["text_encoders"] == [str(path) for path in texts]
    assert (
        main(["generate", "--from", str(tmp_path / "cat.png"), "--model", str(flux), "-o", str(tmp_path / "b.png")])
        == 0
    )
    assert np.array_equal(drawn(tmp_path / "b.png"), image)
    again = render(None, tmp_path / "again", sources=[tmp_path / "cat.png"], model=str(flux), device="cpu")
    assert np.array_equal(drawn(again.paths[0]), image)
    plain = Pipeline("a cat", flux.parent / "folder", **PLACE).generate(**FEW)
    assert not plain.metadata[0].keys() & {"vae", "text_encoders"}


def test_lines_and_manifests_hold_them(apart, tmp_path):
    flux, vae, texts, image = apart
    lines = [{"prompt": "a cat", "seed": 3}]
    lines += [{"prompt": "a cat", "seed": 3, "model": str(flux.parent / "folder"), "text_encoders": []}]
    lines += [{"prompt": "a cat", "seed": 3, "model": str(flux.parent / "folder")}]  # has its own, and the run's
    words = {"vae": str(vae), **PLACE, "num_inference_steps": 2, "height": SIDE, "width": SIDE}
    out = render(lines, tmp_path / "out", text_encoders=texts, model=str(flux), **words)
    assert out.counts["bad_lines"] == 1 and "has text encoders already" in out.report.read_text()
    assert all(np.array_equal(drawn(path), image) for path in out.paths) and len(out.paths) == 2
    first, second = ({"text_encoders": None, **line["settings"]} for line in map(json.loads, out.manifest.open()))
    assert first["text_encoders"] == list(map(str, texts)) and second["text_encoders"] is None
    again = render(None, tmp_path / "again", sources=[out.manifest], **PLACE)
    assert [np.array_equal(drawn(path), image) for path in again.paths] == [True, True]


def test_the_memory_of_all_files_is_planned(apart):
    flux, vae, texts, _ = apart
    files = load_file(flux), load_file(vae), *map(load_file, texts[:2])
    numbers = sum(tensor.numel() for tensors in files for tensor in tensors.values())
    device = memory_of(weight_shapes(flux, vae, texts))["device"]
    assert device["all"] == 2 * numbers
    assert device == memory_of(weight_shapes(flux.parent / "folder", None))["device"]


def test_what_is_not_there_any_more_or_is_another_is_said(apart, tmp_path):
    flux, vae, texts, _ = apart
    tokenizer = shutil.copytree(texts[-1], tmp_path / "tokenizer_2")
    parts = {"vae": vae, "text_encoders": [*texts[:2], tokenizer]}
    found = Pipeline("a cat", flux, **parts, **PLACE).generate(**FEW)
    found.save(tmp_path / "cat.png")
    one = describe(flux, hashed=True, **parts).hash
    assert one == describe(flux, hashed=True, vae=vae, text_encoders=texts).hash
    table = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    word = next(word for word in sorted(vocabulary) if word.isalpha())
    vocabulary[f"{word}x"] = vocabulary.pop(word)
    (tokenizer / "tokenizer.json").write_text(json.dumps(table))
    other = load_model(flux, "cpu", "fp32", **parts)
    assert other.hash != load_model(flux, "cpu", "fp32", vae=vae, text_encoders=texts).hash
    assert (
        describe(flux, hashed=True, **parts).hash
        == describe(flux, hashed=True, vae=vae, text_encoders=[*texts[:2], tokenizer]).hash
        != one
    )
    (replay,) = read_replays([tmp_path / "cat.png"])
    again = Pipeline("a cat", flux, **parts, **PLACE).generate(**FEW)
    (line,) = differences(replay.source, again.metadata[0])
    assert "it will differ" in line
    shutil.rmtree(tokenizer)
    (replay,) = read_replays([tmp_path / "cat.png"])
    with pytest.raises(ConfigError, match="does not exist") as caught:
        keywords(replay)
    assert "--set text_encoders=" in caught.value.hint


def test_another_prediction_type_is_said():
    was = {"schedule": {"prediction_type": "v_prediction", "_class_name": "A"}}
    now = {"schedule": {"prediction_type": "epsilon", "_class_name": "B", "new": 1}}
    assert differences(was, now) == ["prediction_type was 'v_prediction', is 'epsilon': it will differ"]
    assert differences(was, was) == []


def test_a_server_draws_with_them_and_shows_no_path(apart, tmp_path):
    import requests

    flux, vae, texts, image = apart
    with pytest.raises(ModelError, match="has text encoders already"):
        ldm.web(tmp_path / "no", model="default", text_encoders=texts, port=0, block=False)
    words = {"vae": vae, "text_encoders": texts, "port": 0, "block": False, "debug": True}
    served = ldm.web(tmp_path / "gallery", model=[flux, "default"], **words, **PLACE)
    try:
        fields = {"prompt": "a cat", **FEW}
        sent = requests.post(f"{served.url}/api/jobs", json=fields, timeout=60).json()
        job = served.context.queue.find(sent["id"])
        assert job.finished.wait(100) and job.state == "done", job.error
        data = requests.get(f"{served.url}/images/{job.images[0]}.png", timeout=60).content
        (tmp_path / "cat.png").write_bytes(data)
        assert np.array_equal(drawn(tmp_path / "cat.png"), image)
        said = read_metadata(tmp_path / "cat.png")
        assert said.ldm["text_encoders"] == [path.name for path in texts] and said.ldm["vae"] == "ae.safetensors"
        assert str(vae.parent) not in json.dumps(said.ldm) + said.parameters
        sent = {"image": base64.b64encode(data).decode()}
        found = requests.post(f"{served.url}/api/read", json=sent, timeout=60).json()
        assert found["fields"]["vae"] == "ae" and found["notes"] == []
        shown = requests.post(f"{served.url}/api/prompt", json={"prompt": "a cat"}, timeout=60).json()
        assert shown["prompt"]["tokens"] > 0
        steps = requests.get(f"{served.url}/api/info", timeout=60).json()["models"]
        assert [one["factor"] for one in steps] == [4, 8]  # pixels a latent, times the patch size
    finally:
        served.close()


def test_a_fine_tuning_reads_them(apart, tmp_path, monkeypatch):
    flux, vae, texts, _ = apart
    data = pictures(tmp_path / "data", 4, ((32, 32),))
    words = {"vae": str(vae), "steps": 1, "train": "lora"}
    with pytest.raises(ModelError, match="holds no CLIP-L") as caught:
        run(data, tmp_path / "no", flux, **words)
    assert "--text-encoders" in caught.value.hint
    run(data, tmp_path / "run", flux, text_encoders=texts, **words)
    assert settings_of(tmp_path / "run").text_encoders == tuple(map(str, texts))
    run(data, tmp_path / "whole", flux.parent / "folder", steps=1, train="lora")
    first, second = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("run", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    # As on a GPU: the autoencoder alone is read in fp32.
    monkeypatch.setattr(base_model, "frozen_dtype", lambda *_: torch.bfloat16)
    settings, exact = settings_of(tmp_path / "run"), load_model(flux.parent / "folder", "cpu", "fp32").vae
    save_file(load_file(flux.parent / "whole.safetensors"), tmp_path / "plain.safetensors")  # without our settings
    whole = {"model": str(tmp_path / "plain.safetensors"), "vae": None, "text_encoders": (str(texts[-1]),)}
    for one in (settings, dataclasses.replace(settings, **whole)):
        model = base_model.load_base(one, torch.device("cpu"))
        assert model.unet.proj_out.weight.dtype == model.text.dtype == torch.bfloat16
        assert apart_by(model.vae.module.state_dict(), exact.module.state_dict()) == 0
        assert model.vae.scaling_factor == exact.scaling_factor
