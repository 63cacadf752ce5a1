"""Models by their name on the hub: from a server of the test's own, from the cache, or one line on what to do."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ldm.checkpoint import check_model, clear_cache, load_model
from ldm.checkpoint.folder import is_hub_id
from ldm.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"


class Hub:
    """A hub on loopback: repositories as {commit: folder}, branch main at the last; weights come from a "CDN"."""

    def __init__(self):
        self.repositories: dict[str, dict[str, Path]] = {}
        self.asked: list[tuple[str, str, str | None]] = []  # (method, path, authorization)
        self.connections: list[socket.socket] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                hub.connections.append(self.connection)

            def do_GET(self):
                hub.asked.append((self.command, self.path, self.headers.get("Authorization")))
                status, headers, body = hub.answer(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.cdn = f"http://localhost:{self.server.server_port}/cdn"  # another host, as far as a client can tell
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()
        for connection in self.connections:  # kept alive by the client, and by a thread that would go on serving
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def answer(self, path):
        """(status, headers, body) as the hub's documented interface has them."""
        words = path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        if words[0] == "cdn":
            file = next(f for folder in self.folders() for f in folder.rglob("*") if digest(f) == words[1])
            return 200, {"ETag": f'"{words[1]}"'}, file.read_bytes()
        if words[0] == "moved":
            return 307, {"Location": path.replace("/moved/", "/someone/")}, b""
        commits = self.repositories.get("/".join(words[:2]))
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        action, revision, *file = [*words[2:], "info", "main"][: max(2, len(words) - 2)]
        commit = list(commits)[-1] if revision == "main" else revision
        if commit not in commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if action == "resolve":
            return self.file(commits[commit].joinpath(*file), commit)
        if action == "tree":
            return 200, {}, json.dumps(self.tree(commits[commit])).encode()
        return 200, {}, json.dumps({"id": "/".join(words[:2]), "sha": commit, "siblings": []}).encode()

    def file(self, path, commit):
        headers = {"X-Repo-Commit": commit}
        if not path.is_file():
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        if path.suffix != ".safetensors":
            return 200, {**headers, "ETag": f'"{digest(path)[:40]}"'}, path.read_bytes()
        linked = {"X-Linked-ETag": f'"{digest(path)}"', "X-Linked-Size": str(path.stat().st_size)}
        return 302, {**headers, **linked, "ETag": '"of the pointer"', "Location": f"{self.cdn}/{digest(path)}"}, b""

    def tree(self, folder):
        """One entry a file, weights with the sha256 that git-lfs knows them by."""
        entries = []
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            size, name = file.stat().st_size, file.relative_to(folder).as_posix()
            entries.append({"type": "file", "path": name, "size": size, "oid": digest(file)[:40]})
            if file.suffix == ".safetensors":
                entries[-1]["lfs"] = {"oid": digest(file), "size": size, "pointerSize": 130}
        return entries

    def folders(self):
        return [folder for commits in self.repositories.values() for folder in commits.values()]


def digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's library, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    clear_cache()
    return tmp_path / "hub"


@pytest.fixture
def hub(cache, monkeypatch):
    """A server that this process takes for the hub."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.stop()


@pytest.fixture
def served(hub, saved, tmp_path):
    """The tiny model as someone/model, with what a repository may hold beside."""
    folder = shutil.copytree(saved, tmp_path / "served")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"of half precision")
    (folder / "pipeline.py").write_text("raise SystemExit('remote code ran')")
    hub.repositories["someone/model"] = {COMMIT: folder}
    return hub


def test_a_model_is_fetched_pinned_and_loaded_again_without_the_server(served, cache, saved):
    import torch

    assert check_model("someone/model").name == COMMIT  # the settings alone
    assert not any(path.endswith((".safetensors", ".py")) or "/cdn/" in path for _, path, _ in served.asked)
    model = load_model("someone/model", "cpu", "fp32")
    assert model.info["commit"] == COMMIT and model.name == "someone/model" and model.path.name == COMMIT
    local = load_model(saved, "cpu", "fp32")
    assert local.hash == model.hash and "commit" not in local.info
    assert all(torch.equal(t, local.unet.state_dict()[n]) for n, t in model.unet.state_dict().items())
    fetched = {path.name for path in model.path.rglob("*")}
    assert not fetched & {"pipeline.py", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"}
    redirected = [token for _, path, token in served.asked if path.startswith("/cdn/")]
    assert redirected and set(redirected) == {None}  # the token goes to the hub, to no other host
    assert any(token == "Bearer hf_secret" for _, _, token in served.asked)
    served.stop()
    clear_cache()
    again = load_model("someone/model", "cpu", "fp32")
    assert again is not model and again.hash == model.hash and again.info["commit"] == COMMIT


def test_a_name_means_one_commit_as_long_as_the_process_lives(served, tmp_path):
    before = load_model("someone/model", "cpu", "fp32")
    later = shutil.copytree(served.repositories["someone/model"][COMMIT], tmp_path / "later")
    (later / "manifest.json").unlink()
    settings = later / "scheduler/scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "steps_offset": 5}))
    served.repositories["someone/model"][LATER] = later
    asked = len(served.asked)
    assert load_model("someone/model", "cpu", "fp32") is before and len(served.asked) == asked
    assert load_model(f"someone/model@{LATER}", "cpu", "fp32").schedule.steps_offset == 5
    clear_cache()
    assert load_model("someone/model", "cpu", "fp32").info["commit"] == LATER
    assert load_model(f"someone/model@{COMMIT}", "cpu", "fp32").schedule == before.schedule


def test_a_renamed_repository_is_followed(served):
    assert load_model("moved/model", "cpu", "fp32").info["commit"] == COMMIT


def test_half_precision_is_taken_where_there_is_nothing_else(served, saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = served.repositories["someone/model"][COMMIT]
    (folder / "manifest.json").unlink()
    for path in [*(folder / "unet").glob("*.safetensors*")]:
        path.unlink()
    state = {name: t.half() for p in (saved / "unet").glob("*.safetensors") for name, t in load_file(p).items()}
    save_file(state, folder / "unet/diffusion_pytorch_model.fp16.safetensors")
    model = load_model("someone/model", "cpu", "fp32")
    assert all((t == state[name].float()).all() for name, t in model.unet.state_dict().items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("someone/nothing", r"model_index.json of the repository someone/nothing .*there is none of this name"),
        ("someone/model@v9", r"someone/model@v9: .*it has no such revision\); check what follows the @"),
        ("someone/pickled", r"has no vae/diffusion_pytorch_model.safetensors, and pickles are never fetched"),
    ],
)
def test_what_the_hub_has_not_is_one_line(served, cache, name, said):
    folder = shutil.copytree(served.repositories["someone/model"][COMMIT], cache.parent / "pickled")
    for path in (folder / "vae").glob("*.safetensors*"):
        path.rename(path.with_suffix(".bin"))
    served.repositories["someone/pickled"] = {COMMIT: folder}
    with pytest.raises(ModelError, match=said) as error:
        load_model(name, "cpu", "fp32")
    assert str(cache) in str(error.value) and "\n" not in str(error.value)
    assert not list(cache.rglob("*.bin"))


def test_without_network_and_cache_the_line_names_repository_file_and_cache(cache, hub):
    hub.stop()
    for act in (check_model, load_model):
        with pytest.raises(ModelError, match=r"repository someone/model .*hf download someone/model") as error:
            act("someone/model")
        assert str(cache) in str(error.value) and "model_index.json" in str(error.value)
        assert "\n" not in str(error.value)


def test_settings_without_weights_are_not_taken_for_a_model(served, cache):
    check_model("someone/model")
    served.stop()
    clear_cache()
    with pytest.raises(ModelError, match=r"unet/diffusion_pytorch_model.safetensors of the repository") as error:
        load_model("someone/model", "cpu", "fp32")
    assert str(cache) in str(error.value)


def test_the_command_draws_from_the_hub_and_writes_the_commit_into_the_image(served, tmp_path):
    """The library as it is, told of server and cache by its own environment variables."""
    environment = {**os.environ, "HF_ENDPOINT": served.url, "HF_HUB_CACHE": str(tmp_path / "other")}
    words = ["generate", "a cat", "--model", "someone/model", "--steps", "1", "--seed", "3", "--device", "cpu"]
    command = [sys.executable, "-m", "ldm", *words]
    done = subprocess.run([*command, "-o", "a.png"], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    with Image.open(tmp_path / "a.png") as image:
        record = json.loads(image.text["ldm"])
    assert record["model"] == "someone/model" and record["commit"] == COMMIT
    assert {path.name for path in (tmp_path / "other").iterdir()} >= {"models--someone--model"}


def test_what_is_not_cached_is_named_with_the_cache_and_what_to_do(cache):
    for act in (check_model, load_model):
        with pytest.raises(ModelError, match=r"repository someone/model .*\(offline\); .*hf download") as error:
            act("someone/model")
        assert str(cache) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_a_cached_model_loads_and_is_pinned_to_its_commit(cache, saved, revision):
    repository = cache / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    name = f"someone/model{revision}"
    assert check_model(name).name == COMMIT
    model = load_model(name, "cpu", "fp32")
    assert model.path.name == COMMIT and model.name == name


def test_what_can_only_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = {"owner/name": True, "owner/name@v1.0": True, "runs/missing": False, "./owner/name": False}
    names |= {"name": False, "a/b/c": False, "/a/b": False, "~/m": False, "owner/m.ckpt": False, "../a": False}
    assert {name: is_hub_id(name) for name in names} == names
