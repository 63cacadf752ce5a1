"""`ldm doctor`: one page about the machine, without names of users and folders."""

import getpass
import json
import os
import socket
import time
from pathlib import Path

import torch

import ldm
from ldm.bench import machine
from ldm.cli import main
from ldm.errors import ModelError


def test_the_page_and_its_json_say_what_a_bug_report_needs(capsys):
    assert main(["doctor", "--offline", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"] == torch.__version__ and found["ldm"] == ldm.__version__
    assert found["auto"]["dtype"] in ("fp32", "bf16") and found["cpu"]["cores"] == os.cpu_count()
    assert found["attention"]["sdpa"] == found["attention"]["chunked"] == "works"
    assert found["hub"] == "not asked (--offline)" and found["missing"] == [] and "free" in found["memory"]
    assert set(found["extras"]) == set(machine.EXTRAS)
    assert main(["doctor", "--offline"]) == 0
    page = capsys.readouterr().out
    assert len(page.splitlines()) < 60 and "auto picks" in page and torch.__version__ in page


def test_no_personal_paths_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    text = json.dumps(ldm.doctor(offline=True))
    assert str(tmp_path) not in text and str(Path(ldm.__file__).parent) not in text
    assert len(getpass.getuser()) < 3 or f"/{getpass.getuser()}" not in text
    assert ldm.doctor(offline=True, paths=True)["paths"]["here"] == str(tmp_path)


def test_what_is_missing_is_named_with_what_to_do(monkeypatch, capsys):
    def absent():
        raise ModelError("the default model is not there", hint="install the package again")

    monkeypatch.setattr(machine, "default_folder", absent)
    monkeypatch.setattr(machine.util, "find_spec", lambda name: None)
    assert main(["doctor", "--offline"]) == 3
    page = capsys.readouterr().out
    assert "missing     the default model is not there; install the package again" in page
    assert "pip install 'ldm-pipeline[xformers]'" in page


def test_the_hub_is_asked_for_a_short_time_alone(monkeypatch):
    def wait(*_args, **_options):
        time.sleep(0.5)
        raise OSError("nobody")

    monkeypatch.setattr(machine, "HUB_SECONDS", 0.1)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "create_connection", wait)
    start = time.perf_counter()
    assert "does not answer within 0.1 s" in ldm.doctor()["hub"]
    assert time.perf_counter() - start < 4
