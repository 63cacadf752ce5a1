"""`ldm web` before it serves: what it refuses, and what it needs."""

import re
from importlib.metadata import requires

import pytest

import ldm.web
from ldm.checkpoint import load_model
from ldm.cli import main
from ldm.errors import ConfigError
from ldm.web.catalog import Catalog


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(ldm.web, "NEEDED", ("no_such_package", "uvicorn_of_nobody"))
    assert main(["web"]) == 2
    expected = "error: ldm web needs no-such-package, uvicorn-of-nobody; pip install 'ldm-pipeline[web]'\n"
    assert capsys.readouterr().err == expected


def test_an_install_without_the_extra_pulls_none_of_its_packages():
    lines = [line for line in requires("ldm-pipeline") if "extra ==" not in line]
    names = {re.split(r"[ <>=!~;\[(]", line)[0] for line in lines}
    assert "torch" in names and not names & {"starlette", "uvicorn", "python-multipart", "openai", "playwright"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--listen", "0.0.0.0"], "whoever reaches this address could use the server"),
        (["--token", "short"], "expected 16 letters"),
        (["--max-gb", "0"], "max_gb: 0 is outside"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--lora-dir", "/no/such/folder"], "no such folder"),
        (["--lora", "/no/such.safetensors"], "/no/such.safetensors"),
        (["--port", "99999999"], "cannot be listened on"),
        (["-o", "{file}"], "is a file, not a folder"),
        (["--prediction-type", "velocity"], "unknown prediction type 'velocity'"),
        (
            ["--prediction-type", "v", "--model", "a", "--model", "b"],
            "prediction_type: is of one model, and there are 2",
        ),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(words, message, tmp_path, capsys):
    pytest.importorskip("uvicorn")
    (tmp_path / "file").write_text("")
    words = [word.format(file=tmp_path / "file") for word in words]
    out = [] if "-o" in words else ["-o", str(tmp_path / "gallery")]
    assert main(["web", "--no-open", *out, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "gallery").exists()


def test_the_one_model_predicts_what_is_given(tiny_folder):
    (plain, other) = (Catalog.of([tiny_folder], [], [], None, prediction_type=word) for word in (None, "eps"))
    said = [catalog.described(catalog.default)["prediction_type"] for catalog in (plain, other)]
    assert said == ["v_prediction", "epsilon"]
    assert (plain.parts(plain.default), other.parts(other.default)) == ({}, {"prediction_type": "epsilon"})
    assert other.text(other.default).token_ids("a cat")
    with pytest.raises(ConfigError, match="a loaded model has its schedule already"):
        Catalog.of([load_model(tiny_folder)], [], [], None, prediction_type="v")
