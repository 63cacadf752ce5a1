"""`ldm render`: files of every syntax to pictures, exit codes, standard input."""

import io
import json
import sys

import pytest

from ldm.cli import main
from ldm.images import read_metadata

SYNTAXES = (
    "a cat number {i} -- it's plain",
    "--prompt a red dog, number {i} --negative_prompt a 'bad' one --steps 2 --seed {i}",
    'a blue cat number {i} --n "bad, --worse" --w 40 --h 32 --d {i} --s 1 --l 5',
    '{{"prompt": "a dog {i}", "cfg_scale": 1, "num_inference_steps": 2, "seed": {i}}}',
)
BAD = ("a cat --stepz 3", "a cat --w 33", '{{"prompt": "a cat", "seed": }}', "--steps 3", "a {{cat --d {i}", "a --l x")


def mixed_file(path, count, bad):
    """`count` lines of four syntaxes, every so many of them bad; returns the numbers of the bad ones."""
    lines = [SYNTAXES[i % 4].format(i=i) for i in range(count)]
    numbers = [count // bad * k + k % 4 for k in range(bad)]
    for k, number in enumerate(numbers):
        lines[number] = BAD[k % len(BAD)].format(i=number)
    path.write_text("# a mixed file\n\n" + "\n".join(lines) + "\n")
    return [number + 3 for number in numbers]


@pytest.mark.parametrize(
    ("count", "bad"), [(100, 3), pytest.param(1000, 30, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_mixed_file_with_bad_lines(tiny_folder, tmp_path, count, bad, capsys):
    """Faults G 59."""
    numbers = mixed_file(tmp_path / "prompts.txt", count, bad)
    words = ["render", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out")]
    assert main([*words, "--model", str(tiny_folder), "--steps", "1", "--batch-size", "16"]) == 3
    assert len(list((tmp_path / "out").glob("*.png"))) == count - bad
    said = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert [line["line"] for line in said[:-1]] == numbers and all(line["field"] or line["what"] for line in said[:-1])
    assert said[-1]["rendered"] == said[-1]["jobs"] == count - bad and said[-1]["bad_lines"] == bad
    done = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [line["status"] for line in done] == ["done"] * (count - bad)
    assert f"{count - bad} rendered, 0 finished before, {bad} bad lines, 0 failed" in capsys.readouterr().err
    assert main([*words, "--strict", "--model", str(tiny_folder), "--steps", "1"]) == 2


@pytest.mark.slow
def test_two_hundred_prompts_with_a_bar(tiny_folder, tmp_path, monkeypatch, capsys):
    things = ("cat", "dog", "red cat", "blue dog", "cat and dog")
    lines = [f"a {things[i % 5]} on blue --d {i} --s {1 + i % 2} --l {2 + i % 3}" for i in range(200)]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    monkeypatch.setenv("LDM_PROGRESS", "1")
    words = ["render", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out"), "--model", str(tiny_folder)]
    assert main(words) == 0
    last = capsys.readouterr().err.split("rendering:")[-1]
    assert "200/200 [" in last and "images/s]" in last and len(list((tmp_path / "out").glob("*.png"))) == 200


def test_standard_input_defaults_and_formats(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a cat --s 2\na dog --l 1 --d 4\n")))
    words = ["render", "-", "-o", str(tmp_path / "out"), "--model", str(tiny_folder), "--steps", "1", "-n", "2"]
    words += ["--cfg", "3", "--neg", "blue", "--clip-skip", "1", "--format", "webp", "--guidance", "apg", "-q"]
    assert main(words) == 0
    found = [read_metadata(path).ldm for path in sorted((tmp_path / "out").glob("*.webp"))]
    told = [(r["num_inference_steps"], r["guidance_scale"], r["negative_prompt"], r["clip_skip"]) for r in found]
    assert told == [(2, 3.0, "blue", 1)] * 2 + [(1, 1.0, "blue", 1)] * 2
    assert [r["seed"] for r in found[2:]] == [4, 5] and found[0]["seed"] + 1 == found[1]["seed"]
    assert {r["guidance"] for r in found} == {"apg"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.txt"], "nowhere.txt: no such prompt file"),
        (["p.txt", "--steps", "0"], "num_inference_steps: 0 is outside"),
        (["p.txt", "--clip-skip", "-1"], "clip_skip: -1 is outside"),
        (["p.txt", "--sampler", "eular"], "did you mean 'euler'"),
        (["p.txt", "--shard", "3"], "is no shard"),
        (["p.txt", "--seed", "-1"], "seed: -1 is outside"),
        (["p.txt", "--lora", "x.safetensors:0.5"], "'x.safetensors' does not exist"),
        (["p.txt", "--image", "x.png"], "'x.png' does not exist"),
        (["p.txt", "--hires-scale", "0.5"], "hires_scale: 0.5 is not above 1"),
        (["p.txt", "--variation-strength", "0.5"], "a variation needs its own seed"),
        (["p.txt", "--set", "steps=3"], "belongs to --from"),
        (["--from", "nowhere.png"], "no such image or manifest"),
        (["p.txt", "--grid", "stepz=1,2"], "--grid"),
        (["p.txt", "--format", "gif"], "unknown image format"),
        (["p.txt", "-o", "p.txt"], "is a file, not a folder"),
        (["p.txt", "--stepz", "3"], "did you mean '--steps'"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(tiny_folder, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    assert main(["render", "-o", "out", "--model", str(tiny_folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
