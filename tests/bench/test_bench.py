"""Timing by turns, and the refusal to time what does not agree."""

import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm.bench import Timing, alternate, bench
from ldm.bench.warm import FLOW_PEERS, warm
from ldm.checkpoint import save_model
from ldm.cli import main
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, ModelError, NumericsError
from tests.conftest import build_tiny_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def short_prompt(monkeypatch):
    """One that fits the tiny model's 16 tokens: diffusers cuts a longer one, our pipeline reads all of it."""
    monkeypatch.setattr("ldm.bench.warm.PROMPT", "a red cat")


def test_sides_take_turns_and_the_first_rounds_do_not_count():
    calls = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_each_side_is_charged_with_its_own_time_and_nothing_else(monkeypatch):
    """By a clock that only the sides move, and the first round more than the others."""
    clock, calls = [0.0], []
    monkeypatch.setattr("ldm.bench.timing.time.perf_counter", lambda: clock[0])

    def side(name, seconds):
        def call():
            calls.append(name)
            clock[0] += seconds if calls.count(name) > 1 else 100.0

        return call

    seconds = alternate({"slow": side("slow", 2.0), "fast": side("fast", 0.5)}, repeats=3)
    assert seconds == {"slow": [2.0] * 3, "fast": [0.5] * 3} and Timing("x", seconds).ratio == 4


def test_medians_and_ratio():
    timing = Timing("x", {"ours": [1.0, 9.0, 2.0], "theirs": [4.0, 4.0, 5.0]}, {"steps": 3})
    assert timing.medians == {"ours": 2.0, "theirs": 4.0} and timing.ratio == 0.5
    assert "steps 3" in timing.text() and "ratio 0.50" in timing.text()
    assert json.loads(json.dumps(timing.as_json()))["ratio"] == 0.5


def test_warm_against_diffusers(tiny_folder, capsys):
    words = ["bench", "warm", "--model", str(tiny_folder), "--steps", "2", "--repeats", "1", "--json"]
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["bench"] == "warm" and set(found["seconds"]) == {"ldm", "diffusers"}
    assert found["agreement"]["largest difference of 255"] <= 1


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    """The tiny model as a flow model."""
    model = build_tiny_model()
    model = dataclasses.replace(model, schedule=Schedule("flow"))
    return save_model(model, tmp_path_factory.mktemp("models") / "flow", dtype="fp32")


@pytest.mark.parametrize("sampler", FLOW_PEERS)
def test_warm_against_diffusers_with_a_flow_model(sampler, flow_folder):
    timing = warm(1, str(flow_folder), steps=3, sampler=sampler)
    assert timing.agreement["largest difference of 255"] <= 1


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_scheduler_that_diffusers_cannot_use_with_flow_is_refused(sampler, flow_folder):
    with pytest.raises(ConfigError, match=r"sampler: .* does not work with flow models; one of dpmpp_2m, unipc"):
        warm(1, str(flow_folder), steps=3, sampler=sampler)


def test_render_against_loops_over_diffusers(tiny_folder, monkeypatch, capsys):
    from ldm.bench import rendering

    lines = [{"prompt": f"a {('red', 'blue')[i % 2]} cat", "seed": i, "name": str(i)} for i in range(3)]
    lines[1]["negative_prompt"] = "a dog"
    monkeypatch.setattr(rendering, "_lines", lambda count: lines[:count])
    words = ["--model", str(tiny_folder), "--steps", "2", "--images", "3", "--batch-size", "2", "--repeats", "1"]
    assert main(["bench", "render", *words, "--dtype", "auto", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert list(found["seconds"]) == ["ldm.render", "diffusers in batches of 2", "diffusers one by one"]
    agreement = found["agreement"]
    assert agreement["largest difference of 255"] <= 1 and agreement["times as fast as one by one"] > 0
    monkeypatch.setattr(rendering, "own_process", lambda: nullcontext(lambda function, *args: function(*args)))
    monkeypatch.setattr(
        rendering, "_render_diffusers", lambda arguments, lines, folder, size, call: _other_images(folder)
    )
    assert main(["bench", "render", *words]) == 5 and "the images differ by" in capsys.readouterr().err


def _other_images(folder):
    from PIL import Image

    for i in range(3):
        Image.new("RGB", (32, 32), (255, 0, 255)).save(folder / f"{i}.png")
    return folder


def test_the_largest_difference_of_folders(tmp_path):
    from PIL import Image

    from ldm.bench.rendering import _largest_difference

    folders = [tmp_path / str(level) for level in (100, 101, 103)]
    for folder in folders:
        folder.mkdir()
        Image.new("RGB", (32, 32), (7, int(folder.name), 7)).save(folder / "a.png")
    assert _largest_difference(folders, 3.0) == 3
    with pytest.raises(NumericsError, match="the images differ by 3 of 255"):
        _largest_difference(folders, 2.0)


def test_images_that_differ_are_not_timed(tiny_folder, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(
        "ldm.bench.warm._diffusers_call", lambda path, *_: lambda: Image.new("RGB", (32, 32), (255, 0, 255)).save(path)
    )
    with pytest.raises(NumericsError, match="the images differ by"):
        warm(1, str(tiny_folder), steps=1)


def test_auto_is_told_by_what_it_stands_for(tiny_folder, monkeypatch):
    monkeypatch.setattr("ldm.device.pick_device", lambda name: torch.device("cpu"))  # auto, on a machine with a GPU too
    timing = warm(1, str(tiny_folder), steps=1, dtype="auto", device="auto")
    assert timing.settings["dtype"] == "fp32" and timing.settings["device"] == "cpu"
    assert timing.agreement["largest difference of 255"] <= 1


def test_the_profile_names_operators(tiny_folder, capsys):
    warm(1, str(tiny_folder), steps=1, profile=True)
    assert "aten::" in capsys.readouterr().out


def test_cold_starts_new_processes(tiny_folder, monkeypatch):
    """By turns, from this interpreter and this package; the first of each really runs, and draws an image."""
    from ldm.bench import cold

    started, run = [], subprocess.run

    def spied(command, env, **options):
        started.append(command)
        assert command[0] == sys.executable and env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        if len(started) > 2:
            return subprocess.CompletedProcess(command, 0)
        done = run(command, env=env, **options)
        if "generate" in command:
            with Image.open(command[command.index("-o") + 1]) as image:
                assert image.size == (32, 32)
        return done

    monkeypatch.setattr(cold.subprocess, "run", spied)
    (timing,) = bench(["cold"], repeats=2, model=str(tiny_folder))
    assert ["generate" in command for command in started] == [True, False] * 3  # one round to warm up
    assert started[0][started[0].index("--model") + 1] == str(tiny_folder) and "diffusers" in started[1][-1]
    assert {name: len(values) for name, values in timing.seconds.items()} == {"ldm generate": 2, "imports alone": 2}


@pytest.mark.parametrize(
    "words, said",
    [
        (["wram"], "did you mean 'warm'"),
        (["warm", "--sampler", "heun9"], "no equal of 'heun9'"),
        (["--repeats", "0"], "repeats: must be at least 1"),
        (["warm", "--model", "/nowhere"], "/nowhere"),
        (["warm", "--dtype", "fp31"], "fp31"),
    ],
)
def test_what_is_refused_in_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        bench(["warm"], samplr="ddim")


def test_a_process_that_fails_is_told(tmp_path):
    from ldm.bench.cold import cold
    from ldm.errors import LdmError

    with pytest.raises((LdmError, ModelError), match="ended with 2"):
        cold(1, str(tmp_path))


def test_training_against_a_plain_loop(tiny_folder, tmp_path, monkeypatch, capsys):
    from ldm.bench import training

    here = nullcontext(lambda function, *args: function(*args))
    monkeypatch.setattr(training, "own_process", lambda: here)
    model = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "transformer_layers": [0, 1]}
    settings = {"stage": "unet", "steps": 9, "batch_size": 9, "learning_rate": 1e-4, "data": {"resolution": 32}}
    settings |= {"schedule": {"prediction_type": "flow"}, "model": {**model, "num_heads": [1, 2]}, "sampler": "euler"}
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(settings))
    words = ["--config", str(path), "--vae", str(tiny_folder), "--text", str(tiny_folder), "--batch-size", "2"]
    assert main(["bench", "training", *words, "--repeats", "1", "--dtype", "fp32", "--profile"]) == 0
    said = capsys.readouterr().out
    assert said.count("aten::") > 9 and "batch_size 2, dtype fp32" in said and "times as fast" in said
    monkeypatch.setattr(training, "_answer_plain", lambda case: training._answer_ldm(case) * 1.01)
    assert main(["bench", "training", *words]) == 5 and "the networks differ by 0.0" in capsys.readouterr().err
    assert main(["bench", "training", "--config", "emoji/text"]) == 2
    assert "unknown setting 'text'" in capsys.readouterr().err
