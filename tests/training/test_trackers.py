"""What TensorBoard reads back of a run, also of one that was killed and resumed; what is refused before work."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest

from ldm.errors import ConfigError
from ldm.training import train
from ldm.training.loop.step import check_means
from ldm.training.loop.trackers import Trackers
from tests.training.processes import together, train_shared
from tests.training.toy import toy_settings, train_toy


def events(folder):
    """tag → [(step, value)] of all that TensorBoard shows, and the pictures' steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = found.Tags()
    scalars = {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [(e.step, e.width, e.height) for e in found.Images(tag)] for tag in tags["images"]}


def check_events(run):
    """TensorBoard reads what the run's own logs hold, each number once; returns its pictures."""
    scalars, images = events(run / "tensorboard")
    for log, names in (
        ("loss.jsonl", {"loss": "loss", "learning_rate": "lr"}),
        ("scores.jsonl", {"validation_loss": 0}),
    ):
        rows = [json.loads(line) for line in (run / log).read_text().splitlines()]
        for tag, name in names.items():
            expected = [(row["step"], row[name or tag]) for row in rows]
            assert [step for step, _ in scalars[tag]] == [step for step, _ in expected]
            assert np.allclose([v for _, v in scalars[tag]], [v for _, v in expected], rtol=1e-6)
    return images


def test_tensorboard_has_losses_scores_and_pictures_once_each(tmp_path):
    pytest.importorskip("tensorboard")

    def stop(step, micro):
        if step == 7:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_toy(run, report_to=("tensorboard",), inside=stop)
    train_toy(run, "latest", report_to=("tensorboard",))
    images = check_events(run)
    assert images == {"samples": [(step, 24, 8) for step in (0, 4, 8, 12)]}


def test_of_two_processes_one_writes_and_everything_once(tmp_path):
    pytest.importorskip("tensorboard")
    words = {"report_to": ("tensorboard",), "steps": 6, "decay_from": 1}
    work = lambda rank: train_shared(tmp_path / "run", **words) and 0  # noqa: E731
    assert together(2, work) == [0, 0]
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1
    assert check_events(tmp_path / "run") == {"samples": [(step, 24, 8) for step in (0, 4, 6)]}


def test_wandb_is_told_where_to_write_and_to_go_on(tmp_path, monkeypatch):
    """Without its package, by one that keeps what it hears: what Accelerate hands on."""
    pytest.importorskip("accelerate")
    heard = []
    run = types.SimpleNamespace(
        log=lambda values, step=None, **_: heard.append((step, values)), finish=lambda: heard.append("finish")
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **given: heard.append(given) or run
    fake.config = types.SimpleNamespace(update=lambda values, **_: heard.append(values))
    fake.Image = lambda array, **_: array.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers = Trackers(toy_settings(report_to=("wandb",)), tmp_path / "mine", 0)
    trackers.log({"loss": 0.5}, 3)
    from PIL import Image

    trackers.image(Image.new("RGB", (6, 4)), 4)
    trackers.finish()
    first, settings, *rest = heard
    assert (first["name"], first["resume"], first["dir"]) == ("mine", "allow", str(tmp_path / "mine"))
    assert settings["batch_size"] == 4 and settings["data.resolution"] == 128
    assert first["id"] != "mine"  # folders of equal names are not one run
    for step, out, same in ((9, "mine", True), (0, "other/mine", False), (0, "mine", False)):
        heard.clear()
        Trackers(toy_settings(report_to=("wandb",)), tmp_path / out, step)
        assert (heard[0]["id"] == first["id"]) == same
    assert rest == [(3, {"loss": 0.5}), (4, {"samples": [(4, 6, 3)]}), "finish"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"report_to": ("wandb",)}, "report_to: needs the package wandb; pip install wandb"),
        ({"report_to": ("tensorboard",)}, "report_to: needs the package tensorboard"),
        ({"optimizer": "adamw8bit"}, "optimizer: adamw8bit needs a package: pip install bitsandbytes"),
        ({"precision": "fp16"}, "precision: fp16 is for CUDA, not for cpu: use bf16 or fp32"),
    ],
)
def test_what_this_machine_has_not_is_refused_before_work(given, said, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=said):
        check_means(toy_settings(**given))
    words = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    with pytest.raises(ConfigError, match=said):
        train("emoji/autoencoder", tmp_path / "run", [*words, "device=cpu"])
    assert not (tmp_path / "run").exists()
