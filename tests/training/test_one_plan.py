"""`ldm data check`, `--dry-run` and the run follow one plan; a step is the mean of its samples; cards hold no paths."""

import json
import re

import pytest
import torch
from PIL import Image

import ldm
from ldm.checkpoint.lora.write import _card
from ldm.cli import main
from ldm.data.doctor.diagnosis import histogram
from ldm.errors import CheckpointError, DataError
from ldm.nn.lora import LowRank
from ldm.training import finetune
from ldm.training.data.dataset import weighed
from ldm.training.finetuning.command import read_arguments
from ldm.training.finetuning.presets import command
from ldm.training.loop.optimizers import learning_rate
from ldm.training.reports.card import _recipe, name_of
from ldm.training.settings import DataSettings, UNetSettings, lora_name
from tests.training.finetune_cases import SIZE, pictures, resolved, run, settings_of, stage_of

SHAPES = ((40, 30), (30, 40), (48, 27), (36, 24), (32, 32))


def test_the_check_has_the_buckets_steps_and_limits_of_the_trainer(tmp_path, tiny_folder):
    data = pictures(tmp_path / "data", 10, SHAPES)
    (data / "3.txt").write_text("a long word " * 60)
    settings, images = resolved(data, tmp_path / "run", tiny_folder)
    found = ldm.check_data(data, model=tiny_folder)
    assert found.resolution == settings.data.resolution
    assert found.buckets == histogram((item.size for item in images.items), settings.data.buckets)
    assert found.estimate[0] == images.lines[-1]
    assert (
        f": {settings.steps} steps of {settings.batch_size} images at {settings.data.resolution} px"
        in found.estimate[1]
    )
    (long,) = [f for f in found.findings if f.kind == "long captions"]
    assert long.groups == [["3.png"]]
    images.cut = stage_cut(tiny_folder)
    assert any("1 captions are too long" in line for line in images.lines)


def stage_cut(model):
    from ldm.checkpoint import load_model

    return load_model(model).text.truncated


def test_an_image_that_loses_most_of_itself_is_named(tmp_path, tiny_folder):
    data = pictures(tmp_path / "data", 10, ((32, 32),))
    Image.effect_noise((640, 64), 60).convert("RGB").save(data / "wide.png")
    (data / "wide.txt").write_text("wide")
    _, images = resolved(data, tmp_path / "run", tiny_folder)
    said = next(line for line in images.lines if line.startswith("buckets: "))
    assert re.search(r"of 1 images more than 30 %: wide.png \d\d %", said), said
    (narrow,) = [f for f in ldm.check_data(data, model=tiny_folder).findings if f.kind == "narrow"]
    assert re.search(r"of the worst: wide.png \d\d %", narrow.what)


def test_a_refusal_of_the_prior_names_what_helps(tmp_path, tiny_folder, capsys):
    data, prior = pictures(tmp_path / "data"), pictures(tmp_path / "prior" / "10_a", 6)
    pictures(prior.parent / "more", 4)
    asked = ["finetune", str(data), "-o", str(tmp_path / "run"), "--model", str(tiny_folder), "--dry-run"]
    assert main([*asked, "--prior", str(prior.parent)]) == 2
    assert "the prior: 6 of 10 images are in folders such as kohya's" in capsys.readouterr().err


def test_patterns_and_layouts_reach_the_settings_and_the_command(tmp_path):
    asked = read_arguments("data", tmp_path, exclude=["a/*,*.gif", "b"], layout="files")
    assert asked.settings["data.exclude"] == ["a/*", "*.gif", "b"]
    assert "--exclude 'a/*,*.gif,b' --layout files" in command(asked.settings, tmp_path)


def test_each_sample_has_the_same_weight_in_a_step(tmp_path, tiny_folder):
    data = pictures(tmp_path / "data", 9, ((SIZE, SIZE),) * 8 + ((2 * SIZE, SIZE // 2),))
    out = tmp_path / "run"
    run(data, out, tiny_folder, steps=1, accumulation=3, prior=str(pictures(tmp_path / "reg", 6)))
    stage, settings = stage_of(out), settings_of(out)
    batches = list(stage.batches(0))
    assert sorted(len(batch.ids) for batch in batches) == [1, 4, 4]
    shares = {id: batch.weight / settings.accumulation / len(batch.ids) for batch in batches for id in batch.ids}
    assert len(shares) == 9 and all(abs(share - 1 / 9) < 1e-12 for share in shares.values())
    priors = [batch.prior for batch in batches]
    total = sum(len(prior.ids) for prior in priors)
    assert all(abs(p.weight / settings.accumulation / len(p.ids) - 1 / total) < 1e-12 for p in priors)
    assert all(made is batch for made, batch in zip(weighed(batches[:1] * 3), batches[:1] * 3))
    plain = [stage._loss(batch.__class__(**{**vars(batch), "weight": 1.0}), "", 0, 0) for batch in batches]
    for batch, loss in zip(batches, plain):
        torch.testing.assert_close(stage._loss(batch, "", 0, 0), batch.weight * loss)


# resuming


def test_a_learning_rate_that_would_leap_on_resume_is_refused_and_the_advice_works(tmp_path, tiny_folder):
    data, out = pictures(tmp_path / "data"), tmp_path / "run"
    cosine = {"lr_schedule": "cosine", "steps": 6, "save_every": 3}
    run(data, out, tiny_folder, **cosine)
    before = learning_rate(settings_of(out), 6)
    with pytest.raises(
        CheckpointError, match=r"with steps 6 → 12 the learning rate would go from 0.00\d+ to 0.0\d+ at"
    ) as e:
        finetune(data, out, resume=True, steps=12)
    assert "--allow-changed steps" in e.value.hint
    kept = dict(pair.split("=") for pair in re.findall(r"\w+=\S+", e.value.hint))
    finetune(data, out, resume=True, steps=8, overrides=[f"{name}={value}" for name, value in kept.items()])
    assert learning_rate(settings_of(out), 7) == pytest.approx(before, rel=1e-4)
    finetune(data, out, resume=True, steps=9)  # at a constant rate nothing leaps
    with pytest.raises(CheckpointError, match=r"learning_rate 0.0\d+ → 0.5 the learning rate would go .* at step 9"):
        finetune(data, out, resume=True, steps=10, learning_rate=0.5)
    finetune(data, out, resume=True, steps=10, learning_rate=0.5, allow_changed=["learning_rate", "steps"])
    assert settings_of(out).learning_rate == 0.5


# what is given away


def test_cards_hold_names_and_no_paths(tmp_path, tiny_folder):
    data = pictures(tmp_path / "my images")
    run(data, tmp_path / "lora.safetensors", tiny_folder, steps=1)
    assert (tmp_path / "lora.safetensors" / "lora.safetensors").is_file()
    assert [lora_name(name) for name in ("mine.safetensors", "mine", "a.b")] == ["mine", "mine", "a.b"]
    run(data, tmp_path / "full", tiny_folder, steps=1, train="full")
    for card in (tmp_path / "lora.safetensors" / "README.md", tmp_path / "full" / "model" / "README.md"):
        text = card.read_text()
        assert str(tmp_path) not in text and str(tiny_folder) not in text and "`my images`" in text
    places = {"vae": str(tmp_path / "runs" / "vae"), "text": "~/runs/text", "init": "../old"}
    settings = UNetSettings(
        stage="unet", steps=1, batch_size=1, learning_rate=1.0, data=DataSettings(folder=str(data)), **places
    )
    text = _recipe(settings)
    recipe = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert (recipe["vae"], recipe["text"], recipe["init"]) == ("vae", "text", "old")
    assert recipe["data"]["folder"] == "my images" and str(tmp_path) not in text
    assert [name_of(name) for name in ("default", "owner/name", "owner/name@v1")] == [
        "default",
        "owner/name",
        "owner/name@v1",
    ]


def test_the_card_says_which_layers_diffusers_does_not_find_in_kohya_s_file(capsys):
    update = LowRank(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    model = type("Named", (), {"name": "xl", "hash": ""})
    files = {"peft": "pytorch_lora_weights.safetensors", "kohya": "mine.safetensors"}
    layers = {"unet": {"add_embedding.linear_1": update, "conv_in": update}}
    assert "diffusers leaves out 1 layers of `mine.safetensors` (add_embedding.…)" in _card(
        "x", files, model, layers, ""
    )
    assert "diffusers leaves out" not in _card("x", files, model, {"unet": {"conv_in": update}}, "")


def test_training_from_nothing_takes_the_advice_of_a_refusal(tmp_path):
    from ldm.training.command import open_images
    from ldm.training.settings import read_settings

    data = pictures(tmp_path / "data" / "10_a", 8).parent
    pictures(data / "sample", 1)

    def opened(*given):
        base = ["vae=a", "text=b", f"data.folder={data}", "data.resolution=32"]
        return open_images(read_settings("emoji/unet", [*base, *given]), tmp_path / "run")

    with pytest.raises(DataError, match=r"1 of 9 cannot be used") as error:
        opened()
    assert "data.exclude='sample/0.png'" in error.value.hint and "data.layout=files" in error.value.hint
    assert len(opened("data.exclude=sample/*").items) == 8 and len(opened("data.layout=files").items) == 9
