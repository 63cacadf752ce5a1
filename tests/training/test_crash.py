"""A crash at every write, fsync, rename and removal between one checkpoint and the end of a run: nothing is lost."""

import os
import shutil
import sys

import pytest
import safetensors.torch

from ldm.training.checkpoints import reading, state
from tests.children import in_child, status_of
from tests.training.test_survival import ends
from tests.training.toy import train_toy

CRASHED = 77
WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.truncate"}
_crash = {"left": 0, "folder": None}


def tick():
    _crash["left"] -= 1
    if _crash["left"] == 0:
        os._exit(CRASHED)


def watch(event, given):
    """An audit hook: every call that changes what is on the disk below the folder, just before it is made."""
    if _crash["folder"] is None:
        return
    changes = event in WATCHED or (event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if changes and str(given[0]).startswith(_crash["folder"]):
        tick()


def crash_in(folder, number, work):
    """Run `work` in this process, which ends at the number-th of its changes below `folder`."""
    fsync, save_file = os.fsync, safetensors.torch.save_file

    def synced(handle):
        tick()
        fsync(handle)

    def saved(tensors, path, *more):
        """Rust writes this file: crash before it, in the middle of it and after it."""
        tick()
        save_file(tensors, path, *more)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        tick()
        path.write_bytes(content)

    os.fsync, safetensors.torch.save_file = synced, saved
    _crash.update(left=number, folder=str(folder))
    sys.addaudithook(watch)
    work()


KINDS = [
    pytest.param(True, 2, id="lora, every second change"),
    pytest.param(True, 1, id="lora", marks=pytest.mark.slow),
    pytest.param(False, 1, id="full", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("lora", "stride"), KINDS)
def test_a_crash_at_any_change_on_the_disk_leaves_the_last_checkpoint_good(lora, stride, tmp_path):
    train_toy(tmp_path / "whole", lora=lora, save_every=2)
    expected = ends(tmp_path / "whole")
    begun, run = tmp_path / "begun", tmp_path / "run"
    with pytest.raises(Stopped):
        train_toy(begun, lora=lora, save_every=2, inside=stop_at(10))
    before = {state.step_of(f): (f / "state.safetensors").read_bytes() for f in state.checkpoints(begun)}
    assert sorted(before) == [8, 10]
    number, last = 1 - stride, expected["checkpoints/step-00000012/state.safetensors"]
    while True:
        number += stride
        shutil.copytree(begun, run)
        status = status_of(in_child(lambda: crash_in(run, number, lambda: again(run, lora))))  # noqa: B023
        if status == 0:
            break
        assert status == CRASHED
        newest = reading.newest(run)
        content = (newest / "state.safetensors").read_bytes()
        assert content == {**before, 12: last}[state.step_of(newest)], number
        assert not list(run.rglob("corrupt-*"))
        if number % 10 == 1 or list((run / "samples").glob(".tmp-*")):
            again(run, lora)
            assert ends(run) == expected, number
        shutil.rmtree(run)
    assert number > 60


def again(run, lora):
    train_toy(run, "latest", lora=lora, save_every=2)
    return 0


def stop_at(step):
    def inside(now, micro):
        if now == step:
            raise Stopped

    return inside


class Stopped(Exception):
    pass
