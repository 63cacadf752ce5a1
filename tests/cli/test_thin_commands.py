"""The commands that only hand their words on, and the public names of `ldm`."""

import json

import pytest

import ldm
from ldm.cli import main


def test_data_emoji_writes_an_imagefolder(tmp_path, capsys):
    assert main(["data", "emoji", "-o", str(tmp_path / "scenes"), "-n", "2", "--seed", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "scenes" / "metadata.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all((tmp_path / "scenes" / row["file_name"]).is_file() for row in rows)
    assert capsys.readouterr().out.strip() == str(tmp_path / "scenes")
    assert main(["data", "emoji", "-o", str(tmp_path / "other"), "-n", "2", "--seed", "4", "-q"]) == 0
    other = (tmp_path / "other" / "metadata.jsonl").read_text()
    assert other != (tmp_path / "scenes" / "metadata.jsonl").read_text()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"), [(["-n", "0"], "n: must be at least 1"), (["--font", "/no/such.ttf"], "/no/such.ttf")]
)
def test_data_emoji_refuses_in_one_line(words, message, tmp_path, capsys):
    assert main(["data", "emoji", "-o", str(tmp_path / "scenes"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "scenes").exists()


CONFIG = "stage: autoencoder\nsteps: 5\nbatch_size: 2\nlearning_rate: 0.001\n"


@pytest.mark.parametrize("overrides_last", [True, False])
def test_train_hands_on_config_and_overrides(overrides_last, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    overrides, rest = ["steps=7", "ema=0.5"], ["-o", str(tmp_path / "run"), "--dry-run"]
    words = [*rest, *overrides] if overrides_last else [*overrides, *rest]
    assert main(["train", str(tmp_path / "mine.yaml"), *words]) == 0
    shown = capsys.readouterr().err.splitlines()
    assert "steps: 7" in shown and "ema: 0.5" in shown and "batch_size: 2" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["emoji/unett"], "emoji/unett"),
        (["{yaml}", "stepps=7"], "did you mean 'steps'"),
        (["{yaml}", "--resume", "steps=x"], "steps: expected int, got 'x'"),
        (["{yaml}", "loose"], "loose"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_train_refuses_in_one_line(words, message, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(CONFIG)
    words = [word.format(yaml=tmp_path / "mine.yaml") for word in words]
    assert main(["train", *words, "-o", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_public_names():
    from ldm.pipeline import Pipeline
    from ldm.training import train

    assert ldm.Pipeline is Pipeline and ldm.train is train
    assert {"Pipeline", "train", "evaluate"} <= set(dir(ldm))
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = ldm.Pipelin


UNKNOWN_HOME = "~nobody-has-this-name/x"


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "a cat", "--model", UNKNOWN_HOME),
        ("generate", "a cat", "--lora", UNKNOWN_HOME),
        ("generate", "a cat", "--image", UNKNOWN_HOME),
        ("generate", "a cat", "--control", f"edges={UNKNOWN_HOME}"),
        ("inspect", UNKNOWN_HOME),
        ("convert", UNKNOWN_HOME, "out"),
        ("render", UNKNOWN_HOME, "-o", "out"),
        ("verify", UNKNOWN_HOME),
        ("evaluate", "default", "--prompts", UNKNOWN_HOME),
        ("data", "check", UNKNOWN_HOME),
        ("finetune", UNKNOWN_HOME, "-o", "run"),
        ("finetune", "images", "-o", "run", "--model", UNKNOWN_HOME),
    ],
    ids=" ".join,
)
def test_the_home_of_nobody_is_a_place_that_is_not_there(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    assert main(list(words)) in (2, 3, 4)
    told = capsys.readouterr().err
    assert "nobody-has-this-name" in told and "internal error" not in told and len(told.splitlines()) == 1
