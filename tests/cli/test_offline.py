"""`--offline` uses no network, whatever the command; `-v` tells of every connection."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
from PIL import Image

from ldm import console
from ldm.cli import COMMANDS, connections, main

# Runs each command in this process, and tells its exit code and the connections that were tried.
SCRIPT = """
import json, sys
tried = []
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not str(args[1][0]).startswith(("127.", "::1")):
        tried.append(str(args[1]))
    if event == "socket.getaddrinfo" and args[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
        tried.append(str(args[0]))
sys.addaudithook(hook)
from ldm.cli import main
found = {}
for words in json.loads(sys.argv[1]):
    code = main([*words, "--offline"])
    found[words[0]] = [max(code, found.get(words[0], [0])[0]), list(tried)]
    tried.clear()
print("\\n" + json.dumps(found))
"""


def isolated():
    """What a command begins with to have no network; [] where that is not allowed: the hook alone proves it then."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0
    return [unshare, "-rn"] if allowed else []


@pytest.mark.parametrize("which", ["quick", pytest.param("heavy", marks=pytest.mark.slow)])
def test_every_command_works_without_any_network(tiny_folder, tmp_path, which):
    """The slow version has the commands that read files and sets, train, and load peers."""
    data, out, model = tmp_path / "data", tmp_path / "out", str(tiny_folder)
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), ("red", "blue")[i % 2]).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a red cat")
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "mine.yaml").write_text("stage: autoencoder\nsteps: 5\nbatch_size: 2\nlearning_rate: 0.001\n")
    quick = [
        ["generate", "a cat", "--model", model, "--steps", "1", "-o", f"{out}/a.png", "-q"],
        ["verify", f"{out}/a.png", "--model", model, "-q"],
        ["inspect", model],
        ["doctor"],
    ]
    heavy = [
        ["render", str(tmp_path / "p.txt"), "--model", model, "--steps", "1", "-o", f"{out}/r", "-q"],
        ["convert", model, f"{out}/m.safetensors", "-q"],
        ["finetune", str(data), "--model", model, "-o", f"{out}/f", "--dry-run", "-q"],
        ["distill", model, "-o", f"{out}/s", f"data={data}", "--dry-run", "-q"],
        ["train", str(tmp_path / "mine.yaml"), "-o", f"{out}/t", "--dry-run", "-q"],
        ["data", "emoji", "-o", f"{out}/e", "-n", "1", "-q"],
        ["data", "check", str(data), "--no-estimate"],
        ["evaluate", model, "--prompts", "everyday", "-n", "1", "--no-controls", "--steps", "1", "-q"],
        ["bench", "warm", "--repeats", "1", "--steps", "2", "-q"],
    ]
    assert {words[0] for words in quick + heavy} == set(COMMANDS) - {"web"}  # a server, which only listens
    commands = quick if which == "quick" else heavy
    run = [*isolated(), sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert {name: tried for name, (_, tried) in found.items() if tried} == {}
    failed = {name: code for name, (code, _) in found.items() if code not in ((0, 3) if name == "data" else (0,))}
    assert failed == {}, done.stderr[-2000:]


@pytest.fixture
def watched(monkeypatch):
    """Connections are watched, and told as with -v."""
    monkeypatch.setattr(console, "level", 1)
    yield
    connections.rest()


def test_connections_are_told_and_local_ones_are_not(watched, capsys):
    connections.watch(offline=False)
    for host in ("192.0.2.1", "127.0.0.1"):  # the first is of nobody (RFC 5737)
        with socket.socket() as sock:
            sock.settimeout(0.01)
            with pytest.raises(OSError):
                sock.connect((host, 9))
    assert capsys.readouterr().err == "connects to 192.0.2.1:9\n"


def test_offline_refuses_connections_and_names(watched):
    connections.watch(offline=True)
    with socket.socket() as sock, pytest.raises(connections.Offline, match=r"no connection to 192.0.2.1:9"):
        sock.connect(("192.0.2.1", 9))
    with pytest.raises(connections.Offline, match=r"nowhere.example is not looked up"):
        socket.getaddrinfo("nowhere.example", 80)
    connections.rest()
    assert not connections._state["watching"]


def test_a_hub_id_offline_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["generate", "a cat", "--model", "nobody/nothing", "--offline"]) == 2
    error = capsys.readouterr().err
    assert "offline" in error and error.count("\n") == 1
