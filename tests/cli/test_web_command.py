"""`ldm web` before it serves: what it refuses, and what it needs."""

import re
from importlib.metadata import requires

import pytest

import ldm.web
from ldm.cli import main


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
