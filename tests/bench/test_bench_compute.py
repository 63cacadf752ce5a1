"""Networks at equal compute: FLOPs are those that the runs took, scores the judge's, and only like is compared."""

import json
import shutil
import xml.etree.ElementTree as ET

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.bench.compute import ComputeComparison, TrainedRun, compute, plot
from ldm.checkpoint import load_model
from ldm.cli import main
from ldm.evaluation.scores import summary
from ldm.training import train
from ldm.training.forecast import costs
from ldm.training.parts import new_network
from tests.training.conftest import TINY_UNET, threads

SVG = "{http://www.w3.org/2000/svg}"
TRANSFORMER = {"type": "mmdit", "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
EXACT = {"whole_timesteps": False, "spacing": "linspace"}
SHAPES = {"unet": (TINY_UNET, {}), "dit": (TRANSFORMER, EXACT)}


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """A folder with two runs of two and three steps, judged."""
    folder = tmp_path_factory.mktemp("compute")
    asked = {"stage": "unet", "batch_size": 2, "learning_rate": 1e-3, "optimizer": "muon", "workers": 0}
    asked |= {"precision": "fp32", "device": "cpu", "latent_pool": 256, "validation": 4, "sample_steps": 1}
    asked |= {"vae": str(tiny_folder), "text": str(tiny_folder), "sampler": "euler"}
    asked["data"] = {"resolution": 32, "scenes": {"objects": "everyday"}}
    for steps, (name, (model, times)) in enumerate(SHAPES.items(), 2):
        schedule = {"prediction_type": "flow", **times}
        (folder / f"{name}.json").write_text(
            json.dumps({**asked, "steps": steps, "model": model, "schedule": schedule})
        )
        with threads(1):
            train(folder / f"{name}.json", folder / name)
        score = {**summary([]), "n": 2, "first": steps - 1, "match_p50": steps / 10}  # what `ldm evaluate` writes
        (folder / name / "judged").mkdir()
        report = {"list": "small", "n": 2, "seed": 0, "settings": {}, "score": score}
        (folder / name / "judged" / "scores.json").write_text(json.dumps(report))
    return folder


def test_runs_are_compared_by_the_flops_that_they_took_and_the_scores_that_they_got(runs, tmp_path, capsys):
    words = ["bench", "compute", "--runs", str(runs / "unet"), str(runs / "dit"), "-o", str(tmp_path / "out"), "--json"]
    assert main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["benches"]
    assert json.loads((tmp_path / "out" / "compute.json").read_text()) == found
    unet, dit = found["runs"]
    assert (unet["name"], unet["samples"], dit["name"], dit["samples"]) == ("unet", 4, "dit", 6)
    assert [(run["first"], run["n"], run["match"]) for run in (unet, dit)] == [(1, 2, 0.2), (2, 2, 0.3)]
    assert unet["network"].startswith("U-Net, ") and dit["network"].startswith("transformer, ")
    for run in (unet, dit):
        model = load_model(runs / run["name"] / "model", "cpu", "fp32")
        assert run["parameters"] == sum(p.numel() for p in model.unet.parameters())
        read = model.text.encode(["a cat"])
        inputs = torch.randn(1, 4, 4, 4), torch.tensor([500.0]), read.states
        with FlopCounterMode(display=False) as counter, torch.no_grad():  # which does not see a CPU's fused attention
            new_network(model.unet.config)(*inputs, pooled=read.pooled)
        assert 1 <= run["flops"] / (3 * counter.get_total_flops() * run["samples"]) < 1.2
        assert run["flops"] == costs(model.unet.config, False, model.text.max_length)[1] * run["samples"]
        last = json.loads((runs / run["name"] / "scores.jsonl").read_text().splitlines()[-1])
        assert run["x0_error"] == last["x0_error"]
    marks = ET.parse(tmp_path / "out" / "compute.svg").findall(f"{SVG}polygon")
    assert len(marks) == 3 * 2 + 2 * 2  # three scores of two runs, and the legend's


def test_a_line_goes_through_the_means_of_seeds_and_every_run_is_marked():
    def run(name, network, flops, seed, first):
        return TrainedRun(name, network, 10, 1e-3, seed, 1, 1, flops, first, 60, first / 60, 1 / first)

    found = [
        ("a", "U-Net", 1e12, 0, 10),
        ("b", "U-Net", 2e12, 0, 20),
        ("c", "U-Net", 2e12, 1, 40),
        ("d", "DiT", 1e12, 0, 5),
    ]
    svg = ET.fromstring(plot(ComputeComparison({"list": "small"}, tuple(run(*each) for each in found))))
    lines = [
        [tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in svg.findall(f"{SVG}polyline")
    ]
    unet, dit = lines[:2]  # of the first guesses
    assert len(svg.findall(f"{SVG}polygon")) == 3 * 4 + 2 * 2 and len(unet) == 2 and len(dit) == 1
    assert unet[0][0] == dit[0][0] < unet[1][0]
    assert (dit[0][1] - unet[1][1]) == pytest.approx(5 * (dit[0][1] - unet[0][1]), abs=0.6)  # 5 to 30 and to 10: linear
    assert {"first guess, of 60", "match, median", "TFLOPs of the training"} <= {t.text for t in svg.iter(f"{SVG}text")}


def changed(folder, name, values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda run: changed(run, "settings.json", {"batch_size": 4}), "differs from "),
        (lambda run: changed(run, "settings.json", {"timestep_shift": 3.0}), "in timestep_shift: not comparable"),
        (lambda run: changed(run, "settings.json", {"sample_steps": 9}), "in sample_steps: not comparable"),
        (lambda run: changed(run, "judged/scores.json", {"list": "all"}), "in judged: list: not comparable"),
        (lambda run: changed(run, "settings.json", {"steps": 9}), "is not finished: 9 steps are asked for"),
        (lambda run: changed(run, "settings.json", {"stage": "text"}), "is a run of the stage 'text', not of unet"),
        (lambda run: (run / "scores.jsonl").unlink(), "is not finished"),
        (lambda run: (run / "judged" / "scores.json").unlink(), "run `ldm evaluate "),
        (lambda run: (run / "settings.json").unlink(), "give the folder of a run"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(spoil, said, runs, tmp_path, capsys):
    shutil.copytree(runs / "dit", tmp_path / "other")
    spoil(tmp_path / "other")
    words = ["bench", "compute", "--runs", str(runs / "unet"), str(tmp_path / "other"), "-o", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and str(tmp_path / "other") in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "compute.svg").exists()


def test_runs_have_to_be_named():
    with pytest.raises(Exception, match="name finished runs"):
        compute()
