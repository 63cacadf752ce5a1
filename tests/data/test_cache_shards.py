"""Entries in files that check themselves: what comes back is what was put, or nothing."""

import json
import os
import random
import shutil
import time

import pytest
import safetensors.torch
import torch

from ldm import files
from ldm.data.cache import shards
from ldm.data.cache.shards import Shards
from ldm.errors import ResourceError
from tests.children import in_child, status_of


def entry(seed):
    """Tensors of every width, so that odd lengths stand before wide types."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "states": torch.randn((3, 5), generator=draw),
        "half": torch.randn((7,), generator=draw).bfloat16(),
        "mask": torch.rand((5 + seed % 3,), generator=draw) < 0.5,
        "ids": torch.randint(9, (2, 1), generator=draw),
    }


def key(number):
    return f"{number:032x}"


def same(found, expected):
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(
            torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
        )
    )


def fill(folder, numbers, **options):
    with Shards(folder, **options) as store:
        for number in numbers:
            store.put(key(number), entry(number))
        store.flush()


def shard_files(folder):
    return sorted(folder.glob("ldm-cache-*.safetensors"))


def test_entries_come_back_before_and_after_they_are_written(tmp_path):
    with Shards(tmp_path) as store:
        for number in range(5):
            store.put(key(number), entry(number))
            assert same(store.get(key(number)), entry(number)) and not shard_files(tmp_path)
        assert store.get(key(9)) is None and key(9) not in store and key(4) in store
        store.flush()
        store.flush()  # nothing waits: no second shard
        assert all(same(store.get(key(number)), entry(number)) for number in range(5))
    with Shards(tmp_path) as store:
        assert store.known() == {key(number) for number in range(5)}
        assert all(same(store.get(key(number)), entry(number)) for number in range(5))
    (path,) = shard_files(tmp_path)
    loaded = safetensors.torch.load_file(path)  # an ordinary safetensors file to the library
    assert all(torch.equal(loaded[f"{key(2)}.{name}"], tensor) for name, tensor in entry(2).items())


def test_shards_are_bounded_and_the_index_lists_them(tmp_path):
    fill(tmp_path, range(50), shard_bytes=4000)
    found = shard_files(tmp_path)
    assert len(found) > 5 and max(path.stat().st_size for path in found) <= 4000
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["shards"].keys() == {path.name for path in found}
    assert sum(shard["entries"] for shard in index["shards"].values()) == 50
    with Shards(tmp_path) as store:
        assert store.bytes == sum(path.stat().st_size for path in found)
        assert all(same(store.get(key(number)), entry(number)) for number in range(50))


def test_a_shard_is_bounded_in_entries_and_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ENTRIES", 10)
    fill(tmp_path / "entries", range(25))
    assert len(shard_files(tmp_path / "entries")) == 3
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Shards(tmp_path / "time", seconds=60) as store:
        for number in range(9):  # 25 s each: written with the fourth, 75 s after the first
            store.put(key(number), entry(number))
            now[0] += 25
        assert len(shard_files(tmp_path / "time")) == 2


def test_the_newest_entry_of_a_key_counts(tmp_path):
    with Shards(tmp_path) as store:
        store.put(key(1), entry(1))
        store.flush()
        store.put(key(1), entry(2))
        assert same(store.get(key(1)), entry(2))
        for number in range(3, 12):  # past shard 9: numbers, not names, are in order
            store.put(key(number), entry(number))
            store.flush()
    with Shards(tmp_path) as store:
        assert same(store.get(key(1)), entry(2))


def test_no_flipped_bit_gives_a_wrong_entry(tmp_path, capsys, monkeypatch):
    """All over a shard, header and tensors, every third byte, one bit each: an entry is as it was, or is not there."""
    folder = tmp_path / "cache"
    fill(folder, range(3))
    (path,) = shard_files(folder)
    whole = path.read_bytes()
    lost = dropped = 0
    monkeypatch.setattr(Shards, "_write_index", lambda store: None)  # its fsync costs more than all the rest
    draw = random.Random(0)
    for position in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        store = Shards(folder)
        store._open()
        found = [store.get(key(number)) for number in range(3)]
        assert all(tensors is None or same(tensors, entry(number)) for number, tensors in enumerate(found))
        lost += sum(tensors is None for tensors in found)
        dropped += not path.exists()
    assert lost > 1.5 * len(whole) / 3 and 0 < dropped < 0.7 * len(whole) / 3
    assert "is damaged; what it held is made again" in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 5, 100, 0.5, -1])
def test_truncated_shards_are_dropped_and_the_others_stay(tmp_path, capsys, left):
    fill(tmp_path, range(30), shard_bytes=5000)
    first, *others = shard_files(tmp_path)
    with Shards(tmp_path) as store:
        held = {k for k, place in store._table.items() if place.shard == 0}
    whole = first.read_bytes()
    first.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    with Shards(tmp_path) as store:
        assert len(held) > 2 and store.known() == {key(number) for number in range(30)} - held
        assert all(same(store.get(k), entry(int(k, 16))) for k in store.known())
        assert shard_files(tmp_path) == others
        store.put(key(0), entry(0))
    assert f"{first}: is damaged" in capsys.readouterr().err
    with Shards(tmp_path):
        assert capsys.readouterr().err == ""  # said once


def test_truncated_while_it_is_open(tmp_path):
    fill(tmp_path, range(4))
    with Shards(tmp_path) as store:
        (path,) = shard_files(tmp_path)
        os.truncate(path, path.stat().st_size - 1)
        found = [store.get(key(number)) for number in range(4)]
        assert any(tensors is None for tensors in found)
        assert all(tensors is None or same(tensors, entry(number)) for number, tensors in enumerate(found))
        path.unlink()
        assert all(store.get(key(number)) is None for number in range(4))


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b'{"shards": 5}', b'{"shards": {"a": 1}}', b"\xff" * 9, b"[" * 99999]
)
def test_a_lost_or_damaged_index_is_made_again(tmp_path, capsys, content):
    fill(tmp_path, range(5))
    path = tmp_path / "index.json"
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    with Shards(tmp_path) as store:
        assert all(same(store.get(key(number)), entry(number)) for number in range(5))
    assert path.read_bytes() == before
    assert ("index.json: is damaged" in capsys.readouterr().err) == (content is not None)


def test_a_shard_that_is_gone_is_told(tmp_path, capsys):
    fill(tmp_path, range(30), shard_bytes=5000)
    shard_files(tmp_path)[1].unlink()
    with Shards(tmp_path) as store:
        assert 0 < len(store.known()) < 30
    assert "ldm-cache-00001.safetensors: is gone; what it held is made again" in capsys.readouterr().err


def test_files_of_others_are_left_alone(tmp_path):
    mine = {"notes.txt": b"mine", "model.safetensors": b"not one", "ldm-cache.safetensors": b"mine too"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    fill(tmp_path, range(3))
    with Shards(tmp_path):
        pass
    assert all((tmp_path / name).read_bytes() == content for name, content in mine.items())


def test_two_processes_refuse_each_other_by_a_lock(tmp_path):
    def refused():
        with pytest.raises(ResourceError, match="is in use by process"):
            fill(tmp_path, [1])

    with Shards(tmp_path) as store:
        assert status_of(in_child(refused)) == 0
        store.put(key(2), entry(2))
        store.flush()
    assert status_of(in_child(lambda: fill(tmp_path, [3]))) == 0
    with Shards(tmp_path) as store:
        assert store.known() == {key(2), key(3)}


STEPS = ("replace", "fsync", "chmod", "open", "unlink")


def test_a_kill_at_every_step_of_writing_leaves_whole_entries(tmp_path):
    """The process ends at the n-th of all calls that a write makes, for every n: nothing written before is lost."""
    fill(tmp_path / "0", range(4))
    for number in range(1, 100):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "0", folder)

        def work(number=number, folder=folder):
            count = [0]

            def dying(real):
                def call(*args, **kwargs):
                    count[0] += 1
                    if count[0] == number:
                        os._exit(9)
                    return real(*args, **kwargs)

                return call

            with Shards(folder) as store:
                for name in STEPS:
                    setattr(os, name, dying(getattr(os, name)))
                for other in range(4, 8):
                    store.put(key(other), entry(other))
                store.flush()
                store.put(key(0), entry(8))
                store.flush()
            os._exit(0)

        code = status_of(in_child(work))
        with Shards(folder) as store:
            found = {int(k, 16) for k in store.known()}
            assert found in ({0, 1, 2, 3}, set(range(8)))
            for other in found - {0}:
                assert same(store.get(key(other)), entry(other))
            assert same(store.get(key(0)), entry(0)) or (len(found) == 8 and same(store.get(key(0)), entry(8)))
            assert not list(folder.glob(".tmp-*"))
            listed = json.loads((folder / "index.json").read_text())["shards"]
            assert listed.keys() == {path.name for path in shard_files(folder)}
        if code == 0:
            break
        assert code == 9
    assert number > 10 and found == set(range(8))


def test_a_full_disk_is_a_resource_error_and_loses_nothing(tmp_path, monkeypatch):
    import errno

    fill(tmp_path, range(3))
    real = os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Shards(tmp_path) as store:
        store.put(key(3), entry(3))
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"ldm-cache-00001\.safetensors: cannot be written .*free some disk"):
            store.flush()
        assert same(store.get(key(3)), entry(3)) and len(shard_files(tmp_path)) == 1
        monkeypatch.setattr(os, "fsync", real)
        store.flush()  # what waited still waits
    with Shards(tmp_path) as store:
        assert all(same(store.get(key(number)), entry(number)) for number in range(4))


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="is a file, not a folder"), Shards(tmp_path / "file"):
        pass
    with files.Lock(tmp_path / "again"), pytest.raises(ResourceError, match="is in use"), Shards(tmp_path / "again"):
        pass
