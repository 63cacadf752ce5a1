"""Sets by their name on the hub: from a server of the test's own, from the cache, or one line on what to do."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from ldm.data.doctor import check_data
from ldm.data.sources.library import is_hub_id
from ldm.errors import ConfigError

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CAPTIONS = ["a red square", "näht, mit Komma", "猫"]
READ = """
import json, sys
from ldm.data.sources import open_source
from ldm.errors import DataError
for name, stream in json.loads(sys.argv[1]):
    try:
        source = open_source(name, stream=stream)
        samples = [(s.id, s.captions, s.image().size, s.image().getpixel((0, 0))) for s in source]
        source.require(max_bad=0)
        assert list(source.validate()) and (stream or source[2].captions == samples[2][1])
        print(json.dumps([source.layout, samples, source.counts.found, source.lines()[-3:]]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


CHECK = """
import json, sys
from ldm.data.doctor import check_data
for name, first, page in json.loads(sys.argv[1]):
    found = check_data(name, first=first, page=page, resolution=64)
    kinds = {finding.kind: finding.what for finding in found.findings}
    print(json.dumps([found.layout, found.found, found.used, found.captions, found.skipped, kinds, found.lines]))
"""


class Hub:
    """A hub on loopback as its documented interface has it; repositories of data as {name: folder}, one commit each."""

    def __init__(self, repositories):
        self.repositories, self.asked, hub = repositories, [], self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.asked.append(self.path)
                status, headers, data = hub.answer(self.path, body, self.headers.get("Range"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, path, body, ranged):
        """(status, headers, body)"""
        words = path.partition("?")[0].strip("/").split("/")
        words = words[2:] if words[:2] == ["api", "datasets"] else words[1:]
        folder = self.repositories.get("/".join(words[:2]))
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        action, revision, *inside = [*words[2:], "info", "main"][: max(2, len(words) - 2)]
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if action == "resolve":
            return self.file(folder.joinpath(*inside), ranged)
        if action == "tree":
            return self.tree(folder, "/".join(inside))
        files = [{"rfilename": p.relative_to(folder).as_posix()} for p in folder.rglob("*") if p.is_file()]
        info = {"id": "/".join(words[:2]), "sha": COMMIT, "siblings": files, "private": False, "gated": False}
        return 200, {}, json.dumps({**info, "tags": []}).encode()

    def file(self, path, ranged):
        headers = {"X-Repo-Commit": COMMIT}
        if not path.is_file():
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        data = path.read_bytes()
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        if not ranged:
            return 200, headers, data
        first, _, last = ranged.removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        return 206, {**headers, "Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"}, part

    def tree(self, folder, below):
        here = folder / below
        if not here.is_dir():
            return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"
        entries = []
        for path in sorted(here.iterdir()):
            entry = {"path": path.relative_to(folder).as_posix(), "oid": hashlib.sha1(path.name.encode()).hexdigest()}
            kind = {"type": "directory", "size": 0} if path.is_dir() else {"type": "file", "size": path.stat().st_size}
            entries.append({**entry, **kind})
        return 200, {}, json.dumps(entries).encode()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """someone/folder: an imagefolder; someone/table: a parquet file, one of whose rows points out of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("hub")
    for name in ("folder", "table/data", "silent", "outward"):
        (root / name).mkdir(parents=True)
    images, rows = [], []
    for i, text in enumerate(CAPTIONS):
        path = root / "folder" / f"{i}.png"
        Image.new("RGB", (8 + i, 8), (40 * i, 9, 200)).save(path)
        images.append({"bytes": path.read_bytes(), "path": path.name})
        rows.append(json.dumps({"file_name": path.name, "text": text}))
    (root / "folder" / "metadata.jsonl").write_text("\n".join(rows))
    pq.write_table(pa.table({"image": images, "caption": CAPTIONS}), root / "table/data/train-00000-of-00001.parquet")
    pq.write_table(pa.table({"image": images, "label": [1, 2, 3]}), root / "silent/train.parquet")
    outside = [{"bytes": None, "path": str(root / "folder" / "0.png")}, *images[1:]]
    pq.write_table(pa.table({"image": outside, "text": CAPTIONS}), root / "outward/train.parquet")
    hub = Hub({f"someone/{name}": root / name for name in ("folder", "table", "silent", "outward")})
    yield hub
    hub.server.shutdown()


def read(hub, cache, tasks, code=READ, **environment):
    """What a fresh process makes of these (name, stream); the library as it is, told by its environment."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(tasks)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=cache.parent,
    )
    assert done.returncode == 0 and (done.stderr == "" or "latest cached version" in done.stderr), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("home") / "cache"


@pytest.fixture(scope="module")
def answers(hub, cache):
    names = ["someone/folder", "someone/table", f"someone/table@{COMMIT}"]
    tasks = [*((name, stream) for name in names for stream in (False, True)), ("someone/outward", False)]
    tasks += [("someone/silent", False), ("someone/silent", True), ("someone/none", False), ("someone/table@v9", False)]
    return dict(zip(tasks, read(hub, cache, tasks), strict=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["someone/folder", "someone/table", f"someone/table@{COMMIT}"])
def test_a_set_on_the_hub_is_read(answers, name, stream):
    layout, samples, found, lines = answers[name, stream]
    expected = [[f"#{i}", [text], [8 + i, 8], [40 * i, 9, 200]] for i, text in enumerate(CAPTIONS)]
    assert samples == expected and found == 3 and layout.startswith("hub set, split train, images in 'image'")
    assert layout.endswith("read as a stream") == stream and lines[0] == "  #0: a red square"


def test_what_the_hub_has_not_is_one_line(answers):
    said = answers["someone/none", False]
    assert "the set someone/none is neither in" in said and "check the name" in said
    assert "someone/table@v9" in answers["someone/table@v9", False]
    for stream in (False, True):
        assert (
            "holds no captions: the columns are 'image', 'label'; name one of them 'text'"
            in (answers["someone/silent", stream])
        )
    assert "someone/outward#0: holds a path in place of an image" in answers["someone/outward", False]


def test_without_network_the_cache_or_one_line(answers, hub, cache):
    offline = read(hub, cache, [("someone/folder", False), ("someone/silent-too", False)], HF_HUB_OFFLINE="1")
    assert offline[0][1] == answers["someone/folder", False][1]
    assert "someone/silent-too is neither in" in offline[1] and "(offline)" in offline[1]
    assert str(cache) in offline[1] and "hf download someone/silent-too --repo-type dataset" in offline[1]


def test_the_doctor_looks_at_the_first_of_a_set_and_says_so(hub, cache, answers, tmp_path):
    """Without downloading it; where there is no network, at what was downloaded before."""
    page = tmp_path / "check.html"
    tasks = [("someone/table", 2, str(page)), ("someone/folder", 3, None), ("someone/folder", None, None)]
    first, whole, few = read(hub, tmp_path / "home", tasks, code=CHECK)
    assert first[0].endswith("read as a stream, the first 2") and first[1:4] == [2, 2, 2]
    assert first[5]["sample"] == "only the first 2 images were checked" and "few" in first[5]
    assert "  #0: a red square" in first[6] and page.read_text().count("<img") >= 2
    assert whole[1:4] == few[1:4] == [3, 3, 3] and "sample" in whole[5] and "sample" not in few[5]
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".arrow", ".png", ".parquet")]
    (offline,) = read(hub, cache, [("someone/folder", None, None)], code=CHECK, HF_HUB_OFFLINE="1")
    assert offline[1:4] == [3, 3, 3]
    (all_of_it,) = read(hub, cache, [("someone/folder", 0, None)], code=CHECK)
    assert all_of_it[1:4] == [3, 3, 3] and "read as a stream" not in all_of_it[0]
    with pytest.raises(ConfigError, match="first: is for a set on the hub"):
        check_data(tmp_path, first=3)


def test_what_can_only_be_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    names = {"owner/name": True, "owner/name@v1.0": True, "runs/missing": False, "./owner/name": False, "name": False}
    names |= {"a/b/c": False, "/a/b": False, "~/m": False, "../a": False}
    assert {name: is_hub_id(name) for name in names} == names
