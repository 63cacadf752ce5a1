"""Samplers side by side: what is measured is what the pipeline draws, and the choice is what the rule says."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.bench import Timing
from ldm.bench import samplers as bench_of_samplers
from ldm.bench.comparison import Comparison, Row
from ldm.bench.samplers import cost, detail, rms_difference
from ldm.bench.sheet import GAP, GROUP, HEAD, LABELS, SIDE, plot, sheet
from ldm.checkpoint import load_model
from ldm.cli import main
from ldm.diffusion.names import FLOW_SAMPLERS
from ldm.diffusion.samplers import SAMPLERS, stochastic
from ldm.diffusion.schedule import Schedule

SVG = "{http://www.w3.org/2000/svg}"
TWO_STAGES = ("heun", "heun_flow", "dpm2", "dpmpp_2s_ancestral", "dpmpp_sde")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_cost_of_every_sampler(name):
    evaluations, draws = cost(name, torch.tensor([10.0, 6.0, 3.0, 1.0, 0.2, 0.0]))
    assert evaluations == (9 if name in TWO_STAGES else 5)  # a step to 0 has one stage
    adds_noise = SAMPLERS[name].__module__ == stochastic.__name__
    assert draws == ((8 if name == "dpmpp_sde" else 4) if adds_noise else 0)


def test_distance_and_detail_are_what_they_say():
    grey, brighter = (Image.new("RGB", (4, 6), (value,) * 3) for value in (100, 103))
    other = Image.new("RGB", (4, 6), (100, 100, 104))
    assert rms_difference([grey], [grey]) == 0 and rms_difference([grey], [brighter]) == 3
    assert rms_difference([grey, grey], [brighter, other]) == pytest.approx((3 + 4 / 3**0.5) / 2)
    stripes = np.zeros((4, 4, 3), np.uint8)
    stripes[:, ::2] = 90
    assert detail([Image.fromarray(stripes)]) == 45 and detail([grey]) == 0


def rows_of(distances):
    """Rows from {sampler: {(steps, evaluations): distance}}."""
    return tuple(
        Row(name, n, evaluations, distance is None, distance, 1.0)
        for name, found in distances.items()
        for (n, evaluations), distance in found.items()
    )


def comparison(distances, size=(32, 32)):
    rows = rows_of(distances)
    images = {(r.sampler, r.steps): Image.new("RGB", size, (10 * i, 90, 200)) for i, r in enumerate(rows)}
    told = {"model": "m", "images": 3, "prompt": "a cat", "seed": 1, "guidance_scale": 4.0, "reference": "unipc"}
    return Comparison(told, rows, 0.05, images, Image.new("RGB", size, "red"))


@pytest.mark.parametrize(
    "distances, best",
    [
        ({"a": {(4, 4): 9, (8, 8): 3, (16, 16): 2}, "b": {(4, 4): 3.2, (8, 8): 3, (16, 16): 3}}, "a"),  # no budget of 4
        ({"a": {(8, 8): 9, (16, 16): 1}, "b": {(8, 8): 4, (16, 16): 4}}, "a"),  # one budget, 16
        ({"a": {(4, 4): 8, (8, 8): 8, (16, 16): 1}, "b": {(4, 4): 4, (8, 8): 3, (16, 16): 3}}, "a"),  # 8 < 9
        ({"two": {(4, 7): 3, (8, 15): 1, (16, 31): 0.1}, "one": {(4, 4): 9, (8, 8): 3, (16, 16): 1.1}}, "two"),
        ({"two": {(4, 7): 3, (8, 15): 1, (16, 31): 0.1}, "one": {(4, 4): 9, (8, 8): 3, (16, 16): 0.9}}, "one"),
        ({"two": {(4, 9): 0.1, (8, 17): 0.1}, "one": {(4, 4): 9, (8, 8): 9}}, "one"),  # 9 is more than 8
        ({"noisy": {(4, 4): None, (8, 8): None}, "one": {(4, 4): 50, (8, 8): 50}}, "one"),
        ({"noisy": {(4, 4): None}}, None),
        ({"a": {(4, 4): 0.0}, "b": {(4, 4): 1.0}}, "a"),
    ],
)
def test_the_rule_compares_at_equal_evaluations(distances, best):
    found = comparison(distances)
    assert found.recommended == best and f"take {best or 'no one of these'}" in found.text()
    assert json.loads(json.dumps(found.as_json()))["recommended"] == best


def test_the_sheet_holds_each_image_in_its_place_and_says_where_there_is_none():
    found = comparison({"euler": {(4, 4): 2.0, (8, 8): 1.0}, "lcm": {(4, 4): None}}, size=(64, 32))
    paper = sheet(found)
    wide, tall = SIDE, SIDE // 2
    assert paper.size == (LABELS + 3 * (wide + GAP), HEAD + 2 * GROUP + 2 * (tall + GAP))

    def shown(column, row):
        y = HEAD + GROUP * (row + 1) + row * (tall + GAP)
        return paper.crop((LABELS + column * (wide + GAP), y, LABELS + column * (wide + GAP) + wide, y + tall))

    for (column, row), colour in {(0, 0): (0, 90, 200), (1, 0): (10, 90, 200), (0, 1): (20, 90, 200)}.items():
        assert shown(column, row).getcolors() == [(wide * tall, colour)]
    assert shown(2, 0).getcolors() == [(wide * tall, (255, 0, 0))]  # the reference
    assert len(shown(1, 1).getcolors()) > 1  # "not possible", in letters
    assert shown(2, 1).getcolors() == [(wide * tall, (255, 255, 255))]  # no reference for what adds noise


def test_the_plot_shows_distances_by_steps_and_by_evaluations_and_names_what_it_leaves_out():
    distances = {"heun": {(4, 7): 2.0, (8, 15): 0.5}, "euler": {(4, 4): 9.0, (8, 8): 4.0}, "ddpm": {(4, 4): None}}
    tree = ET.fromstring(plot(comparison(distances)))
    texts = [text.text for text in tree.iter(f"{SVG}text")]
    names = [text for text in texts if text in ("heun", "euler", "ddpm")]
    assert names == ["euler", "heun"] and {"steps", "evaluations of the network"} <= set(texts)  # the worst first
    lines = [line.get("points") for line in tree.findall(f"{SVG}polyline")]
    assert len(lines) == 3 * 2  # two in each panel, two in the legend
    assert any("Not drawn: ddpm: they add noise" in text for text in texts)


@pytest.fixture
def short(monkeypatch):
    """A reference of so many steps."""
    monkeypatch.setattr(bench_of_samplers, "REFERENCE_STEPS", 40)
    return 40


def test_the_command_measures_the_images_that_the_pipeline_draws(tiny_folder, tmp_path, short, capsys):
    from ldm import Pipeline

    words = ["bench", "samplers", "--model", str(tiny_folder), "--prompts", "1", "--steps", "2,8"]
    assert main([*words, "--sampler", "DPM++ 2M,heun,ddpm", "-o", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    (found,) = json.loads(out)["benches"]
    assert json.loads((tmp_path / "out" / "samplers.json").read_text()) == found
    rows = {(row["sampler"], row["steps"]): row for row in found["rows"]}
    assert list(rows) == [(name, n) for name in ("dpmpp_2m", "heun", "ddpm") for n in (2, 8)]
    # The first sigma of zero terminal SNR stands for infinity, where Heun's method does without its second evaluation
    assert [rows[name, 8]["evaluations"] for name in ("dpmpp_2m", "heun", "ddpm")] == [8, 14, 8]
    assert rows["heun", 8]["distance"] < rows["heun", 2]["distance"] and rows["ddpm", 8]["distance"] is None

    pipe = Pipeline(found["settings"]["prompt"], model=tiny_folder, dtype="fp32", device="cpu")
    drawn = pipe.generate(seed=1, sampler="heun", num_inference_steps=8)
    reference = pipe.generate(seed=1, sampler="unipc", num_inference_steps=short, spacing="trailing")
    assert (
        rows["heun", 8]["distance"] == pytest.approx(rms_difference(drawn, reference)) and found["reference_error"] < 2
    )
    assert rows["heun", 8]["detail"] == pytest.approx(detail(drawn) / detail(reference))
    paper = Image.open(tmp_path / "out" / "samplers.png")
    place = LABELS + SIDE + GAP, HEAD + GROUP + SIDE + GAP  # second column, second row
    tile = paper.crop((*place, place[0] + SIDE, place[1] + SIDE))
    assert np.array_equal(tile, drawn[0].resize((SIDE, SIDE)))
    ET.parse(tmp_path / "out" / "samplers.svg")
    warned = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert warned and len(warned) == len(set(warned))  # each word that the model does not know is told once


def test_a_flow_model_is_compared_over_its_own_noise_levels(tiny_folder, tmp_path, short):
    from dataclasses import replace

    from ldm.checkpoint import save_model

    folder = tmp_path / "flow"
    save_model(replace(load_model(tiny_folder), schedule=Schedule("flow")), folder, dtype="fp32")
    found = bench_of_samplers.samplers(folder, prompts=1, steps=[2, 8], sampler=["heun_flow", "Euler"])
    by = {(row.sampler, row.steps): row for row in found.rows}
    assert [by["heun_flow", n].evaluations for n in (2, 8)] == [3, 15]
    for name in ("heun_flow", "euler"):
        assert found.reference_error < by[name, 8].distance < by[name, 2].distance
    json.dumps(found.as_json())


def test_all_samplers_that_go_with_the_model_are_drawn(tiny_folder):
    schedule = load_model(tiny_folder).schedule
    assert bench_of_samplers._chosen(None, schedule) == [name for name in SAMPLERS if name != "heun_flow"]
    assert set(bench_of_samplers._chosen(None, Schedule("flow"))) == set(FLOW_SAMPLERS)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--sampler", "euler,heun_flow"], "sampler: heun_flow is for flow models"),
        (["--sampler", "euler,eulr"], "did you mean 'euler'"),
        (["--sampler", "DPM++ 2M Karras"], "names a spacing"),
        (["--steps", "4,x"], "--steps: expected whole numbers with commas, got '4,x'"),
        (["--steps", "0,4"], "steps: 0 is outside 1 to 1000"),
        (["--sampler", "lcm", "--steps", "64"], "steps: no sampler can take 64 steps"),
        (["--prompts", "0"], "prompts: 0 is outside"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--guidance-scale", "3"], "unknown setting 'guidance_scale'"),
        (["--repeats", "3"], "unknown setting 'repeats'"),
        (["-o", __file__], "is a file, not a folder"),
    ],
)
def test_what_is_refused_in_one_line_before_anything_is_drawn(words, said, tiny_folder, capsys):
    status = main(["bench", "samplers", "--model", str(tiny_folder), *words])
    error = capsys.readouterr().err
    assert status in (2, 4) and said in error and error.count("\n") == 1


def test_a_list_of_steps_is_not_for_the_timings(tiny_folder, capsys):
    assert main(["bench", "warm", "--model", str(tiny_folder), "--steps", "4,8"]) == 2
    assert "num_inference_steps: expected a whole number, got [4, 8]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, ran", [([], None), (["warm"], ["warm"]), (["samplers", "render"], ["render", "samplers"])]
)
def test_the_command_runs_the_benches_that_are_named_or_all_rows(words, ran, monkeypatch, capsys):
    from ldm.bench import report

    def called(name):
        return lambda repeats=5: Timing(name, {"ours": [1.0] * repeats, "theirs": [2.0]})

    def described(name):
        return lambda: name

    monkeypatch.setattr(report, "measure", lambda name, repeats, profile: called(name)(repeats))
    for name in list(report.BENCHES):
        monkeypatch.setitem(report.BENCHES, name, described(name) if name in report.ROWS else called(name))
    assert main(["bench", *words, "--repeats", "3", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["benches"]
    assert [result["bench"] for result in results] == (list(report.ROWS) if ran is None else ran)
    assert all(len(result["seconds"]["ours"]) == 3 for result in results)
