"""Manifests of folders: every damage is found and named, and no manifest leads out of its folder."""

import json
import os
import random

import pytest

from ldm.checkpoint.safety import verify_manifest, write_manifest
from ldm.errors import ModelError
from ldm.files import sha256
from tests.anew import write_anew


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "w").write_bytes(bytes(range(256)) * 100)
    (folder / "index.json").write_text("{}")
    (folder / "empty").touch()
    write_manifest(folder)
    return folder


def test_manifest_lists_every_file_and_verifies(model):
    read = []
    listed = verify_manifest(model, read.append)
    assert set(listed) == {"unet/w", "index.json", "empty"} and listed["unet/w"]["size"] == 25600
    assert sum(read) == 25602
    assert json.loads((model / "manifest.json").read_text())["format"] == 1
    (model / "extra").touch()
    write_manifest(model, ["index.json"])
    assert set(verify_manifest(model)) == {"index.json"}
    assert verify_manifest(model.parent) == {}


@pytest.mark.parametrize("name", ["unet/w", "index.json"])
def test_every_damage_is_found_and_named(name, model):
    path = model / name
    data = path.read_bytes()
    for position in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ModelError, match=rf"{name}: does not match the manifest's sha256"):
            verify_manifest(model)
    for damaged in (data[:-1], data + b"\0", b""):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=rf"{name}: does not match"):
            verify_manifest(model)
    path.unlink()
    with pytest.raises(ModelError, match=rf"{name}: listed in the manifest, but missing"):
        verify_manifest(model)
    path.mkdir()
    with pytest.raises(ModelError, match=rf"{name}: listed in the manifest, but missing"):
        verify_manifest(model)


@pytest.mark.parametrize("name", ["../secret", "unet/../../secret", "/etc/passwd", "..", "a/.."])
def test_a_manifest_cannot_lead_out_of_its_folder(name, model):
    entry = {"sha256": sha256("/etc/passwd"), "size": os.path.getsize("/etc/passwd")}
    (model / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: entry}}))
    with pytest.raises(ModelError, match="names a file outside its folder"):
        verify_manifest(model)


BAD_MANIFESTS = ["", "[]", "{}", "nul", '{"files": 3}', '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {}}}']
BAD_MANIFESTS += ['{"files": {"a": {"sha256": "x", "size": "y"}}}', '{"files": {"a": {"sha256": "x", "size": 1e999}}}']
BAD_MANIFESTS += ["[" * 100_000, '{"files": {"a": {"sha256": "x", "size": null}}}', "9" * 5000, "\udcff"]


@pytest.mark.parametrize("text", BAD_MANIFESTS)
def test_a_damaged_manifest_is_named(text, model):
    (model / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=r"manifest.json: the manifest is damaged"):
        verify_manifest(model)


def test_mutants_of_a_manifest_never_verify_and_never_escape(model):
    text, draw = (model / "manifest.json").read_text(), random.Random(1)
    whole = json.loads(text)["files"]
    refused = 0
    for _ in range(2000):
        i = draw.randrange(len(text))
        bit = draw.choice(['"', "{", "}", ":", ",", "..", "/", "9", "a", "\\", "\\u0000", "null", ""])
        write_anew(model / "manifest.json", (text[:i] + bit + text[i + draw.randint(0, 3) :]).encode())
        try:
            assert {n: (e["sha256"], int(e["size"])) for n, e in verify_manifest(model).items()}.items() <= {
                n: (e["sha256"], e["size"]) for n, e in whole.items()
            }.items()
        except ModelError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 1000
