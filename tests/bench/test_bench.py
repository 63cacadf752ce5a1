"""Sides in processes of their own: compared, timed by turns, and left out where they differ, fail or do not fit."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ldm.bench import Timing, alternate, bench, networks, table, timing
from ldm.bench.networks import lora_row, unet_row, vae_row
from ldm.bench.rendering import render_row
from ldm.bench.timing import COMPILED, OURS, PEER, PEER_FP32, Row, Side, Work, measure
from ldm.bench.warm import FLOW_PEERS, warm_row
from ldm.checkpoint import save_model
from ldm.cli import main
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, LdmError
from tests.conftest import build_tiny_model

ROOT = Path(__file__).parents[2]
TINY = {"block_out_channels": (16, 32), "transformer_layers": (1, 1), "num_heads": (2, 4), "norm_num_groups": 8}
TINY |= {"cross_attention_dim": 16, "sample_size": 8, "layers_per_block": 1}
TINY_XL = {**TINY, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
TINY_XL |= {"projection_class_embeddings_input_dim": 64, "use_linear_projection": True}


@pytest.fixture(autouse=True)
def short_prompt(monkeypatch):
    """One that fits the tiny model's 16 tokens: diffusers cuts a longer one, our pipeline reads all of it."""
    monkeypatch.setattr("ldm.bench.warm.PROMPT", "a red cat")


@pytest.fixture
def in_this_process(monkeypatch):
    """Sides are built and called here, each with a state of its own, where processes are not what is tested."""

    @contextmanager
    def here(scratch):
        mine = []

        def ask(function, *arguments):
            timing._WORK[:], future = mine, Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            mine[:] = timing._WORK
            return future

        monkeypatch.setattr(timing, "_SCRATCH", [scratch])
        yield ask

    monkeypatch.setattr(timing, "own_process", here)


@pytest.fixture
def small(monkeypatch):
    """Networks of a few thousand numbers."""
    monkeypatch.setattr(networks, "SIZES", {"sd15": ("tiny", TINY), "xl": ("tiny XL", TINY_XL)})
    monkeypatch.setattr(networks, "QUICK", 8)
    monkeypatch.setattr(networks, "BLOCK", 10_007)
    shape = {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1}
    monkeypatch.setattr(networks, "AUTOENCODER", {**networks.AUTOENCODER, **shape})


def side(numbers=(3.0, 4.0), seconds=0.0, size=0):
    """A side that holds `size` bytes, and tells which process it is in."""
    held = torch.ones(size, dtype=torch.uint8)
    answer = torch.tensor([*numbers])
    Path(os.environ["BENCH_TEST"], str(os.getpid())).touch()
    return Work(lambda: (time.sleep(seconds), len(held)), lambda: answer)


def die():
    os._exit(9)  # as a process does that the system ends for its memory


def broken():
    raise ConfigError("cannot be built", where="the side")


def row(limit=0.1, relative=True, **sides):
    names = {"ours": OURS, "peer": PEER, "compiled": COMPILED}
    return Row("toy", "a toy", {names.get(name, name): one for name, one in sides.items()}, {}, limit, relative)


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
    assert Timing("x", {OURS: [3.0], PEER: [2.0], COMPILED: [1.0]}).ratio == 1.5


def test_each_side_has_a_process_and_the_time_and_memory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_TEST", str(tmp_path))
    monkeypatch.setattr(timing, "SHARED", ())
    sides = {"ours": Side(side, ((3.0, 4.0), 0.0)), "peer": Side(side, ((3.0, 4.0), 0.2, 300_000_000))}
    found = measure(row(**sides, dead=Side(die)), 2)
    processes = {int(path.name) for path in tmp_path.iterdir()}
    assert len(processes) == 2 and os.getpid() not in processes
    assert found.medians[PEER] > 0.2 and found.ratio < 0.9 and len(found.seconds[OURS]) == 2
    assert 250e6 < found.memory[PEER] - found.memory[OURS] < 400e6
    assert found.agreement == {"diffusers: difference of the RMS": 0} and not found.differs
    assert found.left_out == {"dead": "out of memory"}


def test_what_differs_fails_or_does_not_fit_is_left_out(in_this_process, tmp_path, monkeypatch):
    monkeypatch.setenv("BENCH_TEST", str(tmp_path))
    other, nan = Side(side, ((3.0, 5.0),)), Side(side, ((3.0, float("nan")),))
    found = measure(row(ours=Side(side), peer=Side(side), compiled=other, nan=nan, bad=Side(broken)), 1)
    assert list(found.seconds) == [OURS, PEER] and found.differs
    assert found.left_out[COMPILED] == "its result differs by 0.2 of the RMS" and "nan" in found.left_out["nan"]
    assert "cannot be built" in found.left_out["bad"] and "left out: the side" in found.text()
    assert found.agreement["diffusers compiled: difference of the RMS"] == pytest.approx(0.2)
    levels = measure(row(2.0, False, ours=Side(side), peer=other), 1)
    assert levels.agreement == {"diffusers: difference of 255": 1} and not levels.differs
    assert measure(row(0.5, False, ours=Side(side), peer=other), 1).differs
    with pytest.raises(ConfigError, match="cannot be built"):
        measure(row(ours=Side(broken), peer=Side(side)), 1)
    monkeypatch.setattr(timing, "free_memory", lambda device: 10e9)
    found = measure(row(ours=Side(side, (), 5e9), peer=Side(side, (), 5e9)), 1)
    assert list(found.seconds) == [OURS] and found.left_out == {PEER: "too large: 10 GB are free"}
    found = measure(row(ours=Side(side, (), 10e9), peer=Side(side)), 1)
    assert not found.seconds and list(found.left_out) == [OURS, PEER] and found.ratio is None
    assert "too large" in found.text() and table._cell(found, OURS) == "<small>too large: 10 GB are free</small>"


@pytest.mark.parametrize("size, dtype", [("sd15", "fp32"), ("xl", "fp32"), ("sd15", "bf16")])
def test_networks_of_both_sides_agree(size, dtype, small, in_this_process):
    for one in (unet_row(size, dtype, quick=True), lora_row(size, dtype, quick=True)):
        found = measure(one, 1)
        assert set(found.seconds) == {OURS, PEER}, found.left_out
        assert found.agreement["diffusers: difference of the RMS"] < (1e-5 if dtype == "fp32" else 0.05)


def test_other_weights_would_be_seen(small, in_this_process, monkeypatch):
    drawn = networks.unet_diffusers

    def other(*arguments):
        work = drawn(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(networks, "zlib", SimpleNamespace(crc32=len))  # other weights than ours
            other = drawn(*arguments)
        return work._replace(answer=other.answer)

    monkeypatch.setattr(networks, "unet_diffusers", other)
    found = measure(unet_row("sd15", "fp32", quick=True), 1)
    assert found.differs and list(found.seconds) == [OURS]


def test_the_autoencoder_of_both_sides_agrees(small, in_this_process):
    found = measure(vae_row("fp32", quick=True), 1)
    assert set(found.seconds) == {OURS, PEER} and found.left_out == {COMPILED: "not with --quick"}
    assert found.agreement["diffusers: difference of the RMS"] < 1e-5


def test_bytes_are_estimated_before_anything_is_built(small, monkeypatch):
    """SD 1.5 has 0.86 billion weights, in 16 bits."""
    lora = lora_row("sd15", "bf16")
    assert lora.sides[PEER].needs > unet_row("sd15", "bf16").sides[PEER].needs
    monkeypatch.setattr(networks, "SIZES", {"sd15": ("SD 1.5", networks.SD15)})
    large = unet_row("sd15", "bf16")
    assert 1.8e9 < large.sides[OURS].needs < 2.4e9 and large.settings["size"] == "512x512"


@pytest.mark.parametrize("size", ["sd15", "xl"])
def test_openvino_agrees_where_it_is_installed(size, small, in_this_process):
    pytest.importorskip("openvino")
    one = dataclasses.replace(unet_row(size, "fp32"), left_out={})
    sides = {name: one.sides[name] for name in (OURS, "openvino")}
    assert measure(dataclasses.replace(one, sides=sides), 1).agreement["openvino: difference of the RMS"] < 1e-4


def test_bf16_is_measured_against_fp32_too(small, in_this_process):
    assert PEER_FP32 not in unet_row("sd15", "fp32").sides
    one = unet_row("sd15", "bf16")
    found = measure(dataclasses.replace(one, sides={name: one.sides[name] for name in (OURS, PEER_FP32)}), 1)
    assert found.seconds.keys() == {OURS, PEER_FP32}
    assert 1e-4 < found.agreement["diffusers fp32: difference of the RMS"] < 0.05


@pytest.mark.slow
def test_compiled_networks_agree_too(small):
    assert measure(unet_row("sd15", "bf16"), 1).seconds.keys() == {OURS, PEER, PEER_FP32, COMPILED}
    assert measure(vae_row("fp32"), 1).seconds.keys() == {OURS, PEER, COMPILED}


def test_without_a_compiler_it_is_said(monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    assert unet_row("sd15").left_out == {COMPILED: "needs a C++ compiler (no-compiler)"}


@pytest.fixture(scope="module")
def flow_folder(tmp_path_factory):
    """The tiny model as a flow model."""
    model = build_tiny_model()
    model = dataclasses.replace(model, schedule=Schedule("flow"))
    return save_model(model, tmp_path_factory.mktemp("models") / "flow", dtype="fp32")


@pytest.mark.parametrize("sampler", FLOW_PEERS)
def test_warm_with_a_flow_model(sampler, flow_folder, in_this_process):
    found = measure(warm_row(str(flow_folder), 3, sampler, quick=True), 1)
    assert found.agreement["diffusers: difference of 255"] <= 1 and found.memory.keys() == {OURS, PEER}


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_scheduler_that_diffusers_cannot_use_with_flow_is_refused(sampler, flow_folder):
    with pytest.raises(ConfigError, match=r"sampler: .* does not work with flow models; one of dpmpp_2m, unipc"):
        warm_row(str(flow_folder), steps=3, sampler=sampler)


def test_warm_on_the_command_line(tiny_folder, in_this_process, tmp_path, capsys):
    """As text, JSON and a page; then against what was measured before."""
    words = ["bench", "warm", "--model", str(tiny_folder), "--steps", "2", "--repeats", "1", "--quick", "-q"]
    files = {name: str(tmp_path / f"now.{name}") for name in ("json", "html")}
    assert main([*words, "--profile", "--json", files["json"], "--html", files["html"]]) == 0
    said = capsys.readouterr().out
    assert "torch 2" in said and said.count("aten::") > 9 and "ratio" in said
    found = json.loads(Path(files["json"]).read_text())
    (one,) = found["benches"]
    assert one["bench"] == "warm" and set(one["seconds"]) == {OURS, PEER} and found["machine"]["cpu"]["name"]
    html = Path(files["html"]).read_text()
    assert "an image, models in memory" in html and f"{one['medians'][OURS]:.3f}" in html
    one["medians"][OURS] *= 2
    one["settings"]["dtype"] = "bf16"
    Path(files["json"]).write_text(json.dumps(found))
    assert main([*words, "--against", files["json"], "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["benches"][0]["seconds"]) == {OURS, PEER}
    assert main([*words, "--against", files["json"], "--html", files["html"]]) == 0
    line = "warm         not compared: another dtype"
    assert line in capsys.readouterr().out and line in Path(files["html"]).read_text()


def test_two_measurements_compared():
    def document(ours, theirs, size="512x512"):
        cpu = {"name": "one", "usable": 2, "cores": 4, "flags": []}
        machine = {"cpu": cpu, "threads": 2, "memory": "", "gpu": "none"}
        machine |= {"packages": {"torch": "2"}, "date": "2026-01-01"}
        rows = [Timing("vae", {OURS: [ours], PEER: [theirs]}, {"size": size}), Timing("cold", {})]
        return json.loads(json.dumps(table.as_json(machine, rows)))

    lines = table.against(document(4.0, 5.0), document(3.0, 6.0))
    assert lines[2] == "vae          4.000 s then, 3.000 s now: 0.75 of the time; ratio to diffusers 0.80 -> 0.50"
    assert lines[3] == "cold         not in both"
    assert table.against(document(4.0, 5.0), document(3.0, 6.0, "64x64"))[2].endswith("not compared: another size")


@pytest.mark.parametrize("text", ["[]", "{", '{"format": 9}'])
def test_what_is_no_measurement_is_refused(text, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(text)
    assert main(["bench", "--against", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and "give a file of --json" in error and error.count("\n") == 1


def test_render_against_loops_over_diffusers(tiny_folder, in_this_process, monkeypatch):
    lines = [{"prompt": f"a {('red', 'blue')[i % 2]} cat", "seed": i, "name": str(i)} for i in range(3)]
    lines[1]["negative_prompt"] = "a dog"
    monkeypatch.setattr("ldm.bench.rendering._lines", lambda count: lines[:count])
    found = measure(render_row(str(tiny_folder), 2, dtype="auto", images=3, batch_size=2), 1)
    assert list(found.seconds) == [OURS, PEER, "diffusers one by one"]
    assert max(found.agreement.values()) <= 1 and len(found.agreement) == 2


def test_cold_starts_new_processes(tiny_folder, in_this_process, monkeypatch):
    """By turns, from this interpreter and this package; the first of ours really runs, and draws an image."""
    from ldm.bench import cold

    started, run = [], subprocess.run

    def spied(command, env, **options):
        started.append(command)
        assert command[0] == sys.executable and env["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
        if len(started) == 1:
            return run(command, env=env, **options)
        if "-c" in command and len(command) == 5:  # diffusers' script, as if it drew the same
            Image.open(started[0][-1]).save(command[-1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(cold.subprocess, "run", spied)
    (timing,) = bench(["cold"], repeats=2, model=str(tiny_folder))
    assert ["generate" in command for command in started] == [True, False, False] * 3  # the first is compared
    assert started[0][started[0].index("--model") + 1] == str(tiny_folder) and "diffusers" in started[1][2]
    assert {name: len(values) for name, values in timing.seconds.items()} == {OURS: 2, PEER: 2, "imports alone": 2}
    assert timing.agreement == {"diffusers: difference of 255": 0}
    before = len(started)
    monkeypatch.setattr(cold, "drawn_by", lambda command: Work(None, lambda: started.append(command) or torch.zeros(1)))
    (timing,) = bench(["cold"], quick=True, model=str(tiny_folder))
    assert ["generate" in command for command in started[before:]] == [True, False, False]  # one image of each, no more
    assert {name: len(values) for name, values in timing.seconds.items()} == {OURS: 1, PEER: 1, "imports alone": 1}
    assert timing.agreement == {"diffusers: difference of 255": 0}


def test_what_is_done_once_is_timed_by_turns_and_left_out_where_it_differs(in_this_process, monkeypatch):
    """By a clock that only the sides move."""
    clock = [0.0]
    monkeypatch.setattr("ldm.bench.timing.time.perf_counter", lambda: clock[0])

    def slow(number, seconds):
        def answer():
            clock[0] += seconds
            return torch.tensor([number])

        return Work(lambda: pytest.fail("done again"), answer)

    sides = {"ours": Side(slow, (3.0, 2.0)), "peer": Side(slow, (3.0, 5.0)), "other": Side(slow, (4.0, 1.0))}
    found = measure(dataclasses.replace(row(**sides), once=True), 1)
    assert found.seconds == {OURS: [2.0], PEER: [5.0]} and found.differs and list(found.left_out) == ["other"]


@pytest.mark.parametrize("pace", [1, 3])
def test_a_quick_run_leaves_out_what_two_minutes_have_no_room_for(pace, monkeypatch):
    from ldm.bench import report

    clock = [0.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: clock[0])

    def measured(name):
        clock[0] += pace * report.ROW_SECONDS[name]
        return Timing(name, {OURS: [1.0]})

    results = list(report.in_time({name: lambda name=name: measured(name) for name in report.ROWS}))
    assert [result.name for result in results] == list(report.ROW_SECONDS) and clock[0] <= report.QUICK_SECONDS
    assert sorted(report.ROW_SECONDS) == sorted(report.ROWS)
    done = [result.name for result in results if result.seconds]
    skipped = [result for result in results if not result.seconds]
    assert done[:2] == ["cold", "warm"] and (len(skipped) <= 1 if pace == 1 else len(skipped) > 3)
    assert all("no time left (ldm bench" in result.text() for result in skipped)


@pytest.mark.parametrize(
    "words, said",
    [
        (["wram"], "did you mean 'warm'"),
        (["warm", "--sampler", "heun9"], "no equal of 'heun9'"),
        (["--repeats", "0"], "repeats: must be at least 1"),
        (["warm", "--model", "/nowhere"], "/nowhere"),
        (["warm", "--dtype", "fp31"], "fp31"),
        (["unet-sd15", "--dtype", "fp31"], "fp31"),
        (["vae", "--steps", "4"], "unknown setting 'steps'"),
    ],
)
def test_what_is_refused_in_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_unknown_settings_are_named():
    with pytest.raises(ConfigError, match="did you mean 'sampler'"):
        bench(["warm"], samplr="ddim")


def test_a_process_that_fails_is_told():
    from ldm.bench.cold import imported

    with pytest.raises(LdmError, match=r"ended with 1 \(ValueError: no\)"):
        imported([sys.executable, "-c", "raise ValueError('no')"]).call()


def test_training_against_a_plain_loop(tiny_folder, tmp_path, in_this_process, monkeypatch, capsys):
    from ldm.bench import training

    model = {"block_out_channels": [8, 8], "norm_num_groups": 4, "layers_per_block": 1, "transformer_layers": [0, 1]}
    settings = {"stage": "unet", "steps": 9, "batch_size": 9, "learning_rate": 1e-4, "data": {"resolution": 32}}
    settings |= {"schedule": {"prediction_type": "flow"}, "model": {**model, "num_heads": [1, 2]}, "sampler": "euler"}
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(settings))
    words = ["--config", str(path), "--vae", str(tiny_folder), "--text", str(tiny_folder), "--batch-size", "2"]
    words += ["--quick", "--repeats", "1", "--dtype", "fp32"]
    assert main(["bench", "training", *words]) == 0
    said = capsys.readouterr().out
    assert "batch_size 2, dtype fp32" in said and "diffusers: difference of the RMS" in said
    plain = training.train_plain

    def other(case, compiled):
        work = plain(case, compiled)
        return work._replace(answer=lambda: work.answer() * 1.01)

    monkeypatch.setattr(training, "train_plain", other)
    assert main(["bench", "training", *words]) == 3
    assert "left out: its result differs by 0.01 of the RMS" in capsys.readouterr().out
    assert main(["bench", "training", "--config", "emoji/text"]) == 2
    assert "unknown setting 'text'" in capsys.readouterr().err
