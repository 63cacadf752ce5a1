"""Images that the model draws of what it knows before it is fine-tuned."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.errors import ConfigError
from ldm.pipeline import Pipeline
from ldm.training import finetune
from ldm.training.finetuning import prior
from ldm.training.finetuning.base_model import load_base
from ldm.training.settings import FinetuneSettings
from ldm.training.stages.common import networks_of
from ldm.training.stages.finetune import Finetune
from tests.training.finetune_cases import SIZE, apart, last_tensors, pictures, run, settings_of, stage_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures", 4)


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_model_draws_its_own_prior_and_learns_it_beside_the_data(data, tiny_folder, tmp_path, capsys):
    words = {"steps": 2, "prior_images": 3, "class_prompt": "a red cat", "captions": "names"}
    named = tmp_path / "named"  # the prior's captions are in its files all the same
    for path in data.glob("*.png"):
        named.mkdir(exist_ok=True)
        shutil.copy(path, named / f"blue_dog_{path.name}")
    run(named, tmp_path / "run", str(tiny_folder), **words)
    assert "prior: 3 found: 3 used" in (tmp_path / "run" / "index.html").read_text()
    drawn = contents(tmp_path / "run" / "prior")
    assert {name for name in drawn if name.endswith(".txt")} == {"00000.txt", "00001.txt", "00002.txt"}
    assert drawn["00002.txt"] == b"a red cat\n"
    picture = np.asarray(Image.open(tmp_path / "run" / "prior" / "00002.png"))
    (expected,) = Pipeline("a red cat", str(tiny_folder)).generate(seed=3 + 2, height=SIZE, width=SIZE)
    assert np.array_equal(picture, np.asarray(expected))
    run(named, tmp_path / "run", str(tiny_folder), **{**words, "steps": 3}, resume="latest", allow_changed=["steps"])
    assert contents(tmp_path / "run" / "prior") == drawn
    assert "drawing 3 images of what the model knows" in capsys.readouterr().err


@pytest.mark.parametrize("text_encoder", [False, True])
def test_what_the_model_answered_is_right_until_it_is_changed(text_encoder, data, tiny_folder, tmp_path):
    prior = {"prior_images": 2, "prior_prompt": "a cat", "prior_target": "model"}
    run(data, tmp_path / "run", str(tiny_folder), steps=1, text_encoder=text_encoder, **prior)
    stage = stage_of(tmp_path / "run")
    batch = next(stage.batches(0))
    assert stage._loss(batch.prior, "prior ", 0, 0) == 0 < stage._loss(batch, "", 0, 0)
    x, t = torch.randn(len(batch.prior.latents), *batch.prior.latents.shape[1:]), torch.tensor([500.0])
    with torch.no_grad():
        before = stage._teacher(batch.prior, x, t.expand(len(x)))
        for name, parameter in stage.module.named_parameters():
            if name.endswith(".up"):
                parameter += 0.1
        assert torch.equal(stage._teacher(batch.prior, x, t.expand(len(x))), before)
    loss = stage._loss(batch.prior, "prior ", 0, 0)
    assert loss > 0
    loss.backward()
    for part in networks_of(stage.module).values():
        assert any(p.grad.norm() > 0 for p in part.parameters() if p.requires_grad)


PRIOR = {"prior_images": 2, "prior_prompt": "a cat", "steps": 1}


def stop(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("resume", [None, "latest"])
def test_a_run_that_is_stopped_once_its_prior_is_drawn_goes_on(resume, data, tiny_folder, tmp_path, monkeypatch):
    """Its folder holds settings before anything else."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Finetune, "open", stop)
        run(data, out, str(tiny_folder), **PRIOR)
    drawn = {path: path.stat().st_mtime_ns for path in (out / "prior").iterdir()}
    assert len(drawn) == 4
    if resume is None:
        run(data, out, str(tiny_folder), **PRIOR)
    else:
        finetune(out=out, resume=resume)
    assert (out / "pytorch_lora_weights.safetensors").is_file() and settings_of(out).prior_prompt == "a cat"
    assert {path: path.stat().st_mtime_ns for path in (out / "prior").iterdir()} == drawn


def test_a_prior_of_something_else_is_drawn_again(data, tiny_folder, tmp_path, monkeypatch):
    """The same number of images is not the same prior."""
    out, prompts = tmp_path / "run", {}
    for prompt in ("a cat", "a dog"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Finetune, "open", stop)
            run(data, out, str(tiny_folder), **{**PRIOR, "prior_prompt": prompt})
        prompts[prompt] = (out / "prior" / "00001.txt").read_text()
    assert prompts == {"a cat": "a cat\n", "a dog": "a dog\n"}

    settings, folder = settings_of(out), out / "prior"
    model = load_base(settings, torch.device("cpu"))
    before, folder_before = contents(folder), folder.stat()
    data_settings = dataclasses.replace(settings.data, resolution=2 * SIZE)
    for changes, other in (
        ({"seed": 9}, model),
        ({"data": data_settings}, model),
        ({"prior_prompt": "a red dog"}, model),
        ({}, dataclasses.replace(model, hash="another")),
    ):
        drawn = [prior.draw_prior(dataclasses.replace(settings, **changes), other, folder).stat() for _ in range(2)]
        assert drawn[0].st_ino == drawn[1].st_ino != folder_before.st_ino, changes
        folder_before = drawn[1]
    assert contents(prior.draw_prior(settings, model, folder)) == before


def test_a_prior_that_is_not_whole_is_drawn_again(data, tiny_folder, tmp_path):
    run(data, tmp_path / "run", str(tiny_folder), steps=1, prior_images=2, prior_prompt="a cat")
    settings, folder = settings_of(tmp_path / "run"), tmp_path / "run" / "prior"
    before = contents(folder)
    (folder / "00001.png").unlink()
    assert contents(prior.draw_prior(settings, load_base(settings, torch.device("cpu")), folder)) == before


def test_the_default_model_is_asked_for_what_it_was_trained_on():
    found = prior._prompts(FinetuneSettings(1, 1, 0.1, prior_images=50))
    assert len(set(found)) > 45 and sum(" background" in prompt for prompt in found) > 10
    assert found[:20] == prior._prompts(FinetuneSettings(1, 1, 0.1, prior_images=20))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"prior_images": 4}, "needs a prompt for the images"),
        ({"prior_images": 4, "prior": "DATA", "prior_prompt": "a"}, "contradicts prior"),
        ({"prior_prompt": "a cat"}, "give prior_images=N too"),
        ({"prior_images": -1}, "must be 0 to 100,000"),
        ({"prior_target": "model"}, "needs a prior"),
        ({"prior_target": "model", "prior_images": 2, "prior_prompt": "a", "train": "full"}, "is for LoRA and DoRA"),
    ],
)
def test_what_does_not_go_together_is_refused(words, told, data, tiny_folder, tmp_path):
    words = {name: str(data) if value == "DATA" else value for name, value in words.items()}
    with pytest.raises(ConfigError, match=told):
        run(data, tmp_path / "run", str(tiny_folder), **words)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_goes_on(data, tiny_folder, tmp_path):
    """Two graphs: the U-Net with its updates, and without them, as the teacher. Takes a minute."""
    words = {"prior_images": 2, "prior_prompt": "a cat", "prior_target": "model", "learning_rate": 0.01}
    run(data, tmp_path / "eager", str(tiny_folder), **words)
    for steps, resume in ((1, None), (3, "latest")):
        more = {"resume": resume, "allow_changed": ["steps"]} if resume else {}
        run(data, tmp_path / "compiled", str(tiny_folder), **{**words, "steps": steps}, compile=True, **more)
    found, expected = (last_tensors(tmp_path / name) for name in ("compiled", "eager"))
    assert apart(found, expected) < 1e-3
