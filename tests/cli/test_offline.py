"""`--offline` uses no network, whatever the command; `-v` tells of every connection."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from PIL import Image

from ldm import console
from ldm.cli import COMMANDS, build_parser, connections, main

# Runs commands in this process, and tells the exit code of each and the connections that were tried.
SCRIPT = """
import fcntl, json, os, signal, socket, struct, sys, threading, time, urllib.request
tried = []
def hook(event, args):
    if event == "socket.connect" and isinstance(args[1], tuple) and not str(args[1][0]).startswith(("127.", "::1")):
        tried.append(str(args[1]))
    if event == "socket.getaddrinfo" and args[0] not in (None, "", "localhost", "127.0.0.1", "::1"):
        tried.append(str(args[0]))
if sys.argv[2] == "alone":  # a network namespace has its loopback, which is down
    with socket.socket() as sock:
        fcntl.ioctl(sock, 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING
        assert len(socket.if_nameindex()) == 1
sys.addaudithook(hook)

def ask(url, value=None):
    data = None if value is None else json.dumps(value).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)

def use(port, heard):
    for _ in range(300):
        time.sleep(0.2)
        try:
            job = ask(f"http://127.0.0.1:{port}/api/jobs", {"prompt": "a cat", "num_inference_steps": 1})
            while job["state"] in ("queued", "running"):
                time.sleep(0.2)
                job = ask(f"http://127.0.0.1:{port}/api/jobs/{job['id']}")
            heard.append(job["state"])
            break
        except ConnectionError:
            continue
        except OSError as error:
            if not isinstance(getattr(error, "reason", None), ConnectionError):
                heard.append(repr(error))
                break
    os.kill(os.getpid(), signal.SIGINT)

from ldm.cli import main
found = []
for words in json.loads(sys.argv[1]):
    heard = []
    if words[0] == "web":
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        words += ["--port", str(port)]
        threading.Thread(target=use, args=(port, heard), daemon=True).start()
    found.append([main([*words, "--offline"]), list(tried), heard])
    tried.clear()
print("\\n" + json.dumps(found))
"""
# What is run, and its exit code; the first four in one process.
QUICK = ["generate", "verify", "inspect", "doctor"]
RUN = {
    "generate": "generate cat --model {model} --steps 1 -o {out}/a.png -q",
    "verify": "verify {out}/a.png --model {model} -q",
    "inspect": "inspect {model}",
    "doctor": "doctor",
    "preprocess": "preprocess edges {data}/0.png -o {out}/edges.png -q",
    "render": "render {root}/p.txt --model {model} --steps 1 -o {out}/r -q",
    "convert": "convert {model} {out}/m.safetensors -q",
    "finetune": "finetune {data} --model {model} -o {out}/f --steps 1 --samples 0 --prior-images 0 -q",
    "train": "train {root}/mine.yaml data={data} data.resolution=32 -o {out}/t -q",
    "distill": "distill {model} -o {out}/d data={data} --dry-run -q",
    "data emoji": "data emoji -o {out}/e -n 1 -q",
    "data check": "data check {data} --model {model}",
    "data cache": "data cache {data} -o {out}/c --vae {model} --text {model} --resolution 32 -q",
    "evaluate": "evaluate {model} --prompts everyday -n 1 --no-controls --steps 1 -q",
    "bench": "bench warm --quick --steps 2 -q",
    "web": "web -o {out}/w --model {model} --no-open -q",
}
CODES = {"data check": 3, "web": 130}  # few images; ended by Ctrl-C
MINE = """
stage: autoencoder
steps: 1
batch_size: 2
learning_rate: 0.001
precision: fp32
validate_every: 1
model: {{block_out_channels: [8, 8, 8, 8], layers_per_block: 1, norm_num_groups: 4, latent_channels: 4}}
"""


def isolated():
    """What a command begins with to have no network; [] where that is not allowed: the hook alone proves it then."""
    unshare = shutil.which("unshare")
    allowed = unshare and subprocess.run([unshare, "-rn", "true"], capture_output=True, check=False).returncode == 0
    return [unshare, "-rn"] if allowed else []


def test_every_command_is_tried_without_network():
    kinds = next(action for action in build_parser(["data"])[1]["data"]._actions if action.dest == "kind").choices
    assert set(RUN) == {*COMMANDS, *(f"data {kind}" for kind in kinds)} - {"data"}


@pytest.mark.parametrize(
    "names",
    [QUICK, *(pytest.param([name], marks=pytest.mark.slow, id=name) for name in RUN if name not in QUICK)],
    ids=lambda names: "quick",
)
def test_every_command_works_without_any_network(tiny_folder, tmp_path, names):
    """The slow versions are the commands that read sets, train, load peers, and serve."""
    if "web" in names:
        pytest.importorskip("uvicorn")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32), ("red", "blue")[i % 2]).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text("a red cat")
    (tmp_path / "p.txt").write_text("a cat\n")
    (tmp_path / "mine.yaml").write_text(MINE.replace("{{", "{").replace("}}", "}"))
    places = {"model": tiny_folder, "data": data, "out": out, "root": tmp_path}
    commands = [[word.format(**places) for word in RUN[name].split()] for name in names]
    alone = isolated()
    run = [*alone, sys.executable, "-c", SCRIPT, json.dumps(commands), "alone" if alone else "watched"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(zip(names, json.loads(done.stdout.splitlines()[-1]), strict=True))
    assert {name: tried for name, (_, tried, _) in found.items() if tried} == {}
    failed = {name: code for name, (code, _, _) in found.items() if code != CODES.get(name, 0)}
    assert failed == {}, done.stderr[-2000:]
    assert "web" not in found or found["web"][2] == ["done"], done.stderr[-2000:]


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


@pytest.mark.parametrize("word", ["-v", "--offline"])
def test_the_hubs_files_come_by_connections_that_are_seen(word, monkeypatch):
    """Its own library for large files connects outside of Python."""
    seen = {}
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setattr("ldm.cli.doctor.run", lambda args: seen.update(os.environ) or 0)
    assert main(["doctor", word]) == 0
    assert seen["HF_HUB_DISABLE_XET"] == "1" and "HF_HUB_DISABLE_XET" not in os.environ
    assert seen.get("HF_HUB_OFFLINE") == ("1" if word == "--offline" else os.environ.get("HF_HUB_OFFLINE"))


def test_a_hub_id_offline_is_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert main(["generate", "a cat", "--model", "nobody/nothing", "--offline"]) == 2
    error = capsys.readouterr().err
    assert "offline" in error and error.count("\n") == 1
