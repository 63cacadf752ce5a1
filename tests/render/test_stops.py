"""Runs that are stopped: by kill -9, by signals, by a full disk. What was finished stays, what was not is drawn."""

import ctypes
import os
import random
import signal
import time

import pytest
import torch
from render_cases import by_key, identity, pictures, report_of

from ldm.cli import main
from ldm.errors import Interrupted, ResourceError
from ldm.render.drawing.runner import render
from ldm.render.output.lines import read_manifest
from tests.children import in_child, status_of


@pytest.fixture(autouse=True)
def one_thread():
    """Children that are forked may not meet OpenMP's threads, and the number of threads is part of a picture."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lines_of(count):
    return [f"a cat number {i} --d {i} --s {i % 2 + 1}" for i in range(count)]


def done_in(folder):
    return (
        {record["seed"] for record in read_manifest(folder) if record["status"] == "done"} if folder.exists() else set()
    )


def kill_and_go_on(folder, spy, lines, model, kills, rng):
    """Render in child processes that are killed after a random number of batches; then once to the end."""

    def run():
        return render(lines, folder, model=model, batch_size=4).exit_code

    for _ in range(kills):
        done, before, drawn = done_in(folder), identity(folder) if folder.exists() else {}, len(spy.batches)
        pid, after = in_child(run), rng.randrange(1, 4)
        while (
            len(spy.batches) < drawn + after and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not done & {seed for batch in spy.batches[drawn:] for seed in batch}  # nothing finished is drawn again
        assert identity(folder).items() >= before.items()
    done, before, drawn = done_in(folder), identity(folder), len(spy.batches)
    assert status_of(in_child(run)) == 0
    assert not done & {seed for batch in spy.batches[drawn:] for seed in batch}
    assert identity(folder).items() >= before.items()


@pytest.mark.parametrize(
    ("count", "kills"), [(24, 3), pytest.param(970, 10, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_killed_at_random_moments_a_run_ends_with_the_same_files(tiny_folder, tmp_path, spy, count, kills):
    """Faults G 58: every picture once, but for those in flight."""
    lines, model = lines_of(count), str(tiny_folder)
    render(lines, tmp_path / "whole", model=model)  # loads what children share
    spy.path.unlink()
    kill_and_go_on(tmp_path / "killed", spy, lines, model, kills, random.Random(count))
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole") and len(done_in(tmp_path / "killed")) == count
    assert count <= len(spy.seeds) <= count + kills * (4 + 16 + 1)
    assert sorted(path.name for path in (tmp_path / "killed" / ".render" / "1-of-1").iterdir()) == [".lock"]
    assert report_of(tmp_path / "killed")[-1]["not_reached"] == 0


def signalled(spy, number, times=1):
    """Send this process a signal while its second batch is drawn."""

    def before(_seeds, _settings):
        if len(spy.batches) == 1:
            for _ in range(times):
                os.kill(os.getpid(), number)

    return before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_batch_in_hand(tiny_folder, tmp_path, spy, number, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(f"a cat --d {i}" for i in range(9)))
    words = ["render", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "out"), "--model", str(tiny_folder)]
    words += ["--steps", "1", "--batch-size", "2"]
    spy.before, handler = signalled(spy, number), signal.getsignal(number)
    assert main(words) == 128 + number
    assert spy.batches == [[0, 1], [2, 3]] and done_in(tmp_path / "out") == {0, 1, 2, 3}
    assert "stopped after 4 images, all saved; the same command goes on" in capsys.readouterr().err
    assert report_of(tmp_path / "out")[-1]["not_reached"] == 5
    assert signal.getsignal(number) is handler
    spy.before = None
    assert main(words) == 0 and len(done_in(tmp_path / "out")) == 9


def test_a_second_signal_stops_at_once(tiny_folder, tmp_path, spy):
    spy.before = signalled(spy, signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        render([f"a cat --d {i}" for i in range(9)], tmp_path / "out", model=tiny_folder, steps=1, batch_size=2)
    assert spy.batches == [[0, 1]]
    spy.before = None
    render([f"a cat --d {i}" for i in range(9)], tmp_path / "out", model=tiny_folder, steps=1, batch_size=2)
    assert len(done_in(tmp_path / "out")) == 9


def test_python_callers_get_interrupted(tiny_folder, tmp_path, spy):
    spy.before = signalled(spy, signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped after 4 images") as stop:
        render([f"a cat --d {i}" for i in range(9)], tmp_path / "out", model=tiny_folder, steps=1, batch_size=2)
    assert stop.value.exit_code == 130


# A full disk

NEWUSER, NEWNS = 0x10000000, 0x00020000
REMOUNT = 32


def in_own_tmpfs(folder, size):
    """Give this (forked) process a small file system at `folder`. Returns a function that gives it another size."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(NEWUSER | NEWNS):
        return None
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)

    def mount(flags, size):
        return libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, f"size={size}k".encode()) == 0

    return (lambda more: mount(REMOUNT, more)) if mount(0, size) else None


def test_a_full_disk_stops_the_run_and_loses_nothing(tiny_folder, tmp_path):
    """Faults G 62: exit code 4, every line of the manifest has its whole file, and room is all that a rerun needs."""
    lines, folder = [f"a cat --d {i}" for i in range(40)], tmp_path / "full"
    words = {"model": str(tiny_folder), "steps": 1, "batch_size": 4}
    render(lines, tmp_path / "whole", **words)
    expected = by_key(tmp_path / "whole")
    folder.mkdir()

    def run():
        resize = in_own_tmpfs(folder, 120)
        if resize is None:
            return 77
        try:
            render(lines, folder, **words)
            return 71
        except ResourceError as error:
            assert error.exit_code == 4 and "free some disk space" in str(error), error
        kept, before = by_key(folder), identity(folder)
        assert 3 < len(kept) < 40 and kept.items() <= expected.items()
        assert len(pictures(folder)) - len(kept) in (0, 1)  # one whole picture may lack its line
        assert resize(4000)
        found = render(lines, folder, **words)
        assert found.counts["finished_before"] == len(kept) and by_key(folder) == expected
        assert identity(folder).items() >= before.items() and len(pictures(folder)) == 40
        return 0

    status = status_of(in_child(run))
    if status == 77:
        pytest.skip("namespaces are not allowed here")
    assert status == 0
