"""Files whole or not at all: every step of a write made to fail, writers killed, disks full, locks left behind."""

import contextlib
import os
import random
import re
import resource
import signal
import stat
import subprocess
import threading
import time
from pathlib import Path

import pytest

from ldm import files
from ldm.errors import ResourceError
from tests.children import in_child, status_of

STEPS = ("replace", "rename", "fsync", "link", "chmod", "mkdir")  # of os, that a write may go through


class Injected(Exception):
    """No OSError: a bug or a signal in the middle."""


def fail_at(monkeypatch, number, error):
    """Make the `number`-th of all calls to STEPS raise; returns the list of the names called."""
    calls = []

    def failing(name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == number:
                raise error
            return real(*args, **kwargs)

        return call

    for name in STEPS:
        monkeypatch.setattr(os, name, failing(name))
    return calls


def tree(folder):
    """{relative path: content} of all files below, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    yield
    os.umask(before)


def holder(folder):
    """What the lock says, read by another process: closing the file here would drop a lock of our own."""
    return subprocess.run(["cat", folder / ".lock"], capture_output=True, text=True, check=True).stdout


def wait_for(condition, limit=60.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


# one file


@pytest.mark.parametrize("data", [b"\0new", "nëw", lambda path: path.write_text("drawn")])
def test_atomic_write_writes_and_makes_folders(data, tmp_path):
    path = tmp_path / "a" / "b" / "x.txt"
    assert files.atomic_write(path, data) == path
    expected = b"drawn" if callable(data) else data.encode() if isinstance(data, str) else data
    assert tree(tmp_path) == {"a/b/x.txt": expected}
    files.atomic_write(str(path), b"second")
    assert tree(tmp_path) == {"a/b/x.txt": b"second"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Injected("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [True, False])
def test_atomic_write_that_fails_at_any_step(overwrite, error, tmp_path, monkeypatch):
    """The old content stays until the new is in place; nothing else is ever left."""
    path, published, number = tmp_path / "x.bin", 0, 0
    while True:
        number += 1
        if overwrite:
            path.write_bytes(b"old")
        else:
            path.unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number, error)
            try:
                files.atomic_write(path, b"new content", overwrite=overwrite)
                failed = False
            except (ResourceError, Injected, KeyboardInterrupt) as caught:
                failed = True
                assert isinstance(caught, ResourceError) == isinstance(error, OSError)
        left = tree(tmp_path)
        if len(calls) < number:
            break
        step = calls[number - 1]
        before = {"x.bin": b"old"} if overwrite else {}
        assert left in (before, {"x.bin": b"new content"}), (number, step)
        assert failed or step in ("link", "mkdir"), "only then is there another way, or nothing to do"
        published += left != before
    assert not failed and left == {"x.bin": b"new content"}
    assert {"fsync", "replace" if overwrite else "link", "chmod"} <= set(calls)
    assert published <= 3 < number  # the sync after the new name stands, a link or folder that is not needed


def test_atomic_write_whose_function_fails(tmp_path):
    (tmp_path / "x").write_bytes(b"old")

    def half(path):
        path.write_bytes(b"hal")
        raise Injected

    with pytest.raises(Injected):
        files.atomic_write(tmp_path / "x", half)
    assert tree(tmp_path) == {"x": b"old"}


def test_atomic_write_keeps_the_suffix_for_writers_that_go_by_it(tmp_path):
    seen = []
    files.atomic_write(tmp_path / "x.webp", lambda path: seen.append(path.suffix) or path.touch())
    assert seen == [".webp"]


def test_without_overwrite_an_existing_file_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        files.atomic_write(path, b"new", overwrite=False)
    monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(FileExistsError):
        files.atomic_write(path, b"new", overwrite=False)
    assert tree(tmp_path) == {"x": b"old"}


def _no_links(*_args):
    raise PermissionError(1, "Operation not permitted")


def test_without_overwrite_where_there_are_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _no_links)
    files.atomic_write(tmp_path / "x", b"new", overwrite=False)
    assert tree(tmp_path) == {"x": b"new"}
    monkeypatch.setattr(os, "replace", _no_links)
    with pytest.raises(ResourceError, match="y: cannot be written"):
        files.atomic_write(tmp_path / "y", b"new", overwrite=False)
    assert tree(tmp_path) == {"x": b"new"}


def test_many_threads_write_one_name_each_whole(tmp_path):
    won, contents = [], [bytes([i]) * 50_000 for i in range(8)]

    def work(content):
        files.atomic_write(tmp_path / "shared", content)
        with contextlib.suppress(FileExistsError):
            files.atomic_write(tmp_path / "first", content, overwrite=False)
            won.append(content)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    left = tree(tmp_path)
    assert sorted(left) == ["first", "shared"] and left["shared"] in contents and won == [left["first"]]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_get_the_mode_that_umask_says(mask, tmp_path):
    def private(path):
        path.touch(mode=0o600)

    with umask(mask):
        files.atomic_write(tmp_path / "a", private)
        with files.atomic_folder(tmp_path / "f") as new:
            private(new / "b")
    for path in (tmp_path / "a", tmp_path / "f" / "b"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_write_never_opens_the_umask(tmp_path, monkeypatch):
    """Not for a moment: other threads create files meanwhile."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    files.atomic_write(tmp_path / "a", b"")
    with files.atomic_folder(tmp_path / "f") as new:
        (new / "b").touch()
    assert tree(tmp_path) == {"a": b"", "f/b": b""}


NAMES = ["é" * 120 + ".png", "x" * 255, "y" * 100 + "." + "z" * 150, ".hidden", "-rf", "a b\n.txt", "name."]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_the_system_takes_can_be_written(name, tmp_path):
    files.atomic_write(tmp_path / name, b"1")
    files.atomic_write(tmp_path / name, b"2")
    assert tree(tmp_path) == {name: b"2"}


@pytest.mark.parametrize("below", ["x", "deep/er/x"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_path_below_a_file_is_one_line(below, overwrite, tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(ResourceError, match=r"file/.*x: cannot be written \(Not a directory\); choose another folder"):
        files.atomic_write(tmp_path / "file" / below, b"", overwrite=overwrite)
    with pytest.raises(ResourceError, match="Not a directory"), files.atomic_folder(tmp_path / "file" / below):
        pass
    with pytest.raises(ResourceError, match="Not a directory"), files.atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(ResourceError, match="is a file, not a folder"):
        files.require_writable(tmp_path / "file" / below)
    with pytest.raises(ResourceError, match="Not a directory"), files.Lock(tmp_path / "file"):
        pass
    assert tree(tmp_path) == {"file": b"mine"}


def test_a_name_that_is_too_long_or_a_folder_is_one_line(tmp_path):
    with pytest.raises(ResourceError, match=r"File name too long.*choose a shorter name"):
        files.atomic_write(tmp_path / ("x" * 256), b"")
    with pytest.raises(ResourceError, match="File name too long"):
        files.require_writable(tmp_path / ("x" * 256))
    with pytest.raises(ResourceError, match="File name too long"):
        files.require_space(tmp_path / ("x" * 256), 1)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match=r"folder: cannot be written \(Is a directory\)"):
        files.atomic_write(tmp_path / "folder", b"")
    assert tree(tmp_path) == {}


# folders


def write_two(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_bytes(b"new a")
    (folder / "b").write_bytes(b"new b")


OLD, NEW = {"t/old": b"old"}, {"t/sub/a": b"new a", "t/b": b"new b"}


@pytest.mark.parametrize("exists", [True, False])
def test_atomic_folder_appears_as_a_whole(exists, tmp_path):
    target = tmp_path / "t"
    if exists:
        target.mkdir()
        (target / "old").write_bytes(b"old")
    with files.atomic_folder(target) as new:
        write_two(new)
        assert new.parent == tmp_path and target.exists() == exists
    assert tree(tmp_path) == NEW


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), Injected("bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_atomic_folder_that_fails_at_any_step(exists, error, tmp_path, monkeypatch):
    target, outcomes, number = tmp_path / "t", set(), 0
    while True:
        number += 1
        with contextlib.suppress(FileNotFoundError):
            files.shutil.rmtree(target)
        if exists:
            target.mkdir()
            (target / "old").write_bytes(b"old")
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number, error)
            with contextlib.suppress(ResourceError, Injected, KeyboardInterrupt), files.atomic_folder(target) as new:
                write_two(new)
        assert [p.name for p in tmp_path.iterdir()] in ([], ["t"])
        left = tree(tmp_path)
        if len(calls) < number:
            break
        assert left in (OLD if exists else {}, NEW), (number, calls[-1])
        outcomes.add((calls[number - 1], left == NEW))
    assert left == NEW
    assert {("rename", False), ("fsync", False), ("chmod", False)} <= outcomes
    assert ("rename", True) not in outcomes


def test_atomic_folder_follows_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "t").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "t").symlink_to(tmp_path / "big" / "t")
    with files.atomic_folder(tmp_path / "here" / "t") as new:
        write_two(new)
    assert (tmp_path / "here" / "t").is_symlink()
    assert sorted(os.listdir(tmp_path / "big" / "t")) == ["b", "sub"]
    assert os.listdir(tmp_path / "here") == os.listdir(tmp_path / "big") == ["t"]


@pytest.mark.parametrize("trial", range(12))
def test_a_killed_writer_leaves_old_or_new_after_a_sweep(trial, tmp_path):
    """A real SIGKILL at some moment of endless replacing; the content is always one of those written whole."""
    target = tmp_path / "t"

    def content(i):
        return {f"t/{n}": str(i).encode() * 1000 for n in "abc"} | {"x": str(i).encode() * 1000}

    def work():
        for i in range(1_000_000):
            with files.atomic_folder(target) as new:
                for name in "abc":
                    (new / name).write_bytes(str(i).encode() * 1000)
            files.atomic_write(tmp_path / "x", str(i).encode() * 1000)

    pid = in_child(work)
    try:
        wait_for((tmp_path / "x").exists)
        time.sleep(random.Random(trial).uniform(0, 0.02))
    finally:
        os.kill(pid, signal.SIGKILL)
        assert status_of(pid) == -signal.SIGKILL
    files.sweep(tmp_path)
    left = tree(tmp_path)
    done = int(left["x"][: len(left["x"]) // 1000])
    assert left in (content(done), {**content(done + 1), "x": content(done)["x"]})


@pytest.mark.parametrize("stop_at", ["rename", "replace", "fsync", "mkdir", "chmod"])
def test_killed_at_the_very_step(stop_at, tmp_path):
    """The process dies in place of the n-th such call, for every n."""
    for number in range(1, 20):
        folder = tmp_path / str(number)
        (folder / "t").mkdir(parents=True)
        (folder / "t" / "old").write_bytes(b"old")
        (folder / "x").write_bytes(b"old")

        def work(folder=folder, number=number):
            real, calls = getattr(os, stop_at), []

            def deadly(*args, **kwargs):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            setattr(os, stop_at, deadly)
            with files.atomic_folder(folder / "t") as new:
                write_two(new)
            files.atomic_write(folder / "x", b"new")

        code = status_of(in_child(work))
        files.sweep(folder)
        left = tree(folder)
        x = left.pop("x")
        assert (left, x) in ((OLD, b"old"), (NEW, b"old"), (NEW, b"new"))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0 and number > 1


def limited(work, size=100_000):
    """`work` in a child in which no file can grow beyond `size` bytes, as on a full disk; its exit code."""

    def inner():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return status_of(in_child(inner))


def test_a_full_disk_is_one_line_and_nothing_half_written(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "old").write_bytes(b"old")
    (tmp_path / "x").write_bytes(b"old")
    before = tree(tmp_path)

    def folder():
        with files.atomic_folder(tmp_path / "t") as new:
            (new / "small").write_bytes(b"s")
            (new / "big").write_bytes(bytes(200_000))

    assert limited(lambda: files.atomic_write(tmp_path / "x", bytes(200_000))) == 4
    assert limited(lambda: files.atomic_write(tmp_path / "y", bytes(200_000), overwrite=False)) == 4
    assert limited(folder) == 4
    assert limited(lambda: files.Lock(tmp_path / "t").__enter__(), size=0) == 4
    (tmp_path / "t" / ".lock").unlink()
    assert tree(tmp_path) == before


def test_too_little_space_is_said_before(tmp_path):
    with pytest.raises(ResourceError, match=r"^.*/new: 1000000000 TB are needed, [\d.]+ [GT]B are free; free some"):
        files.require_space(tmp_path / "new", 10**21)
    files.require_space(tmp_path / "new", 1)
    files.require_writable(tmp_path / "not" / "yet")
    assert tree(tmp_path) == {} and not os.listdir(tmp_path)


def test_sweep_takes_only_what_writers_left(tmp_path):
    mine = [".tmp-mine", ".old-photos", ".tmp-", "tmp-1-x", ".tmp-x-1", ".old-12", ".lock", ".oldest-1-x"]
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / ".tmp-77-0.png").write_bytes(b"half")
    (tmp_path / ".tmp-77-t").mkdir()
    (tmp_path / ".tmp-77-t" / "half").touch()
    (tmp_path / ".tmp-77-link").symlink_to(tmp_path)
    for number, (pid, target) in enumerate([(9, "gone-now"), (10, "gone-now"), (9, "there")]):
        old = tmp_path / f".old-{pid}-{target}"
        old.mkdir()
        (old / "content").write_text(str(pid))
        os.utime(old, (number, number))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "content").write_text("new")
    swept = files.sweep(tmp_path)
    assert len(swept) == 6
    assert sorted(os.listdir(tmp_path)) == sorted([*mine, "gone-now", "there"])
    assert (tmp_path / "gone-now" / "content").read_text() == "10"  # the newer of two
    assert (tmp_path / "there" / "content").read_text() == "new"
    assert files.sweep(tmp_path) == files.sweep(tmp_path / "nowhere") == []


# locks


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    def work():
        with files.Lock(tmp_path):
            pass

    with files.Lock(tmp_path):
        assert holder(tmp_path) == str(os.getpid())
        pid = in_child(work)
        assert status_of(pid) == 4
        with pytest.raises(
            ResourceError, match=f"^{re.escape(str(tmp_path))}: is in use by process {os.getpid()}; wait"
        ):
            work()
    assert status_of(in_child(work)) == 0
    with files.Lock(tmp_path / "x" / ".." / "y"):
        assert (tmp_path / "y" / ".lock").exists()


def test_another_process_is_named_and_a_killed_one_gives_way(tmp_path):
    def hold():
        with files.Lock(tmp_path):
            (tmp_path / "ready").touch()
            time.sleep(60)

    pid = in_child(hold)
    try:
        wait_for((tmp_path / "ready").exists)
        with pytest.raises(ResourceError, match=f"is in use by process {pid};"), files.Lock(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        status_of(pid)
    with files.Lock(tmp_path):
        assert holder(tmp_path) == str(os.getpid())


def test_workers_that_outlive_the_holder_do_not_keep_its_lock(tmp_path):
    def hold_and_fork():
        with files.Lock(tmp_path):
            worker = in_child(lambda: time.sleep(60))
            files.atomic_write(tmp_path / "worker", str(worker))
            os._exit(0)

    assert status_of(in_child(hold_and_fork)) == 0
    worker = int((tmp_path / "worker").read_text())
    try:
        os.kill(worker, 0)  # it lives
        with files.Lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_child_cannot_take_or_drop_its_parents_lock(tmp_path):
    def inner():
        try:
            with files.Lock(tmp_path):
                os._exit(1)
        except ResourceError as error:
            os._exit(0 if f"process {parent};" in str(error) else 2)

    parent = os.getpid()
    lock = files.Lock(tmp_path)
    with lock:
        assert status_of(in_child(inner)) == 0
        assert status_of(in_child(lambda: lock.__exit__())) == 0  # closes its copy of the handle
        assert status_of(in_child(inner)) == 0
    assert status_of(in_child(inner)) == 1


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1 kB"), (1234, "1.23 kB"), (999_500, "1 MB"), (33.7e9, "33.7 GB")],
)
def test_bytes_are_told_in_decimal_units_with_three_digits(size, text):
    assert files.format_bytes(size) == text


def test_bytes_are_formatted_in_one_place():
    """No other file of the package divides into units, or writes one behind a number that it computes."""
    unit, found = re.compile(r"\}\s?[kMGT]i?B\b|1e[69]:[^}]*\}\s?[GM]B"), []
    for path in Path(files.__file__).parent.rglob("*.py"):
        found += [f"{path}: {line}" for line in path.read_text().splitlines() if unit.search(line)]
    assert found == []
