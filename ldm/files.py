"""Files that are never half-written: atomic files and folders, sha256, locks, free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

from ldm.errors import LdmError, ResourceError

DISK_HINTS = {
    errno.ENOSPC: "free some disk space",
    errno.EDQUOT: "free some of your disk quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written",
    errno.ENOTDIR: "choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}
_numbers = itertools.count()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn every OSError of writing `path` into ResourceError, except FileExistsError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        what = f"cannot be written ({error.strerror or error})"
        raise ResourceError(what, where=path, hint=DISK_HINTS.get(error.errno)) from None


def _create(path: Path) -> int:
    """Create an empty file; returns the permissions that the umask, or the folder's default ACL, gave it."""
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # os.umask would change it for a moment
    return stat.S_IMODE(path.stat().st_mode)


def _fsync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file has this name
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other write uses, with its suffix, by which writers of images choose the format."""
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= 32 else ""
    return path.with_name(f".tmp-{os.getpid()}-{next(_numbers)}{suffix}")


def _publish(tmp: Path, path: Path) -> None:
    """Rename `tmp` to `path`. Raises FileExistsError where `path` exists."""
    try:
        os.link(tmp, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(tmp, path)
        except BaseException:
            os.unlink(path)
            raise


def atomic_write(
    path: str | Path,
    data: bytes | str | Callable[[Path], None],
    overwrite: bool = True,
    scratch: str | Path | None = None,
) -> Path:
    """Write a whole file or nothing: a temporary name beside it (or in `scratch`, an existing folder), fsync, rename.

    `data` is the content, or a function that writes to a path. With `overwrite=False` an existing file is kept and
    FileExistsError raised. Raises ResourceError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    tmp = _temporary(Path(scratch or path.parent) / path.name)
    try:
        with disk_errors(path):
            _make_folder(path.parent)
            mode = _create(tmp)
            if callable(data):
                data(tmp)
            else:
                tmp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            _fsync(tmp)
            tmp.chmod(mode)  # safetensors leaves 0600
            (os.replace if overwrite else _publish)(tmp, path)
            _fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()
    return path


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block succeeds; on any error it is removed.

    An existing `target` is moved aside first and removed after the new one is in place; a link is followed. Raises
    ResourceError when the disk is full or the folder cannot be written.
    """
    target = Path(target)
    target = Path(os.path.realpath(target)) if target.is_symlink() else target
    tmp, old = (target.with_name(f".{kind}-{os.getpid()}-{target.name}") for kind in ("tmp", "old"))
    try:
        with disk_errors(target):
            _make_folder(target.parent)
            if target.exists() and not target.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
            mode = _create(tmp / ".mode")
            (tmp / ".mode").unlink()
            yield tmp
            for path in sorted(tmp.rglob("*"), reverse=True):
                if path.is_file():
                    path.chmod(mode)
                _fsync(path)
            _fsync(tmp)
            if target.exists():
                os.rename(target, old)
            os.rename(tmp, target)
            _fsync(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: str | Path) -> list[str]:
    """Remove what killed writers left (`.tmp-PID-…`) and restore what they moved aside; returns the names."""
    folder, swept = Path(folder), []
    left = [p for p in folder.glob(".*") if re.match(r"\.(tmp|old)-\d+-.", p.name)]
    for path in sorted(left, key=lambda p: p.lstat().st_mtime, reverse=True):  # the newest of two goes back
        target = folder / path.name.split("-", 2)[2]
        swept.append(path.name)
        if path.name.startswith(".old-") and not target.exists():
            path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return swept


def sha256(path: str | Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """Hex digest of a file, streamed; `advance` is called with the number of bytes read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def _existing(folder: str | Path) -> Path:
    """The folder, or its nearest existing parent."""
    probe = Path(folder).absolute()
    with disk_errors(Path(folder)):
        while not probe.exists():
            probe = probe.parent
    return probe


def require_writable(folder: str | Path) -> None:
    """Raise ResourceError unless a file can be created in `folder` (or its nearest existing parent)."""
    probe = _existing(folder)
    if not probe.is_dir():
        raise ResourceError("is a file, not a folder", where=probe, hint="choose another folder")
    name = probe / f".tmp-{os.getpid()}-probe"
    try:
        with disk_errors(Path(folder)):
            name.touch()
    finally:
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def require_place(folder: str | Path) -> None:
    """Raise ResourceError, with the exit code of a refusal, unless a file can be created in `folder`."""
    try:
        require_writable(folder)
    except ResourceError as error:
        error.exit_code = LdmError.exit_code
        raise


def require_space(folder: str | Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes are free where `folder` is or will be."""
    free = free_space(folder)
    if free < needed:
        raise ResourceError(
            f"{format_bytes(needed)} are needed, {format_bytes(free)} are free",
            where=folder,
            hint="free some disk space",
        )


def format_bytes(size: float) -> str:
    """A number of bytes as text: 512 B, 1.23 MB, 33.7 GB. Three digits; a MB is 1,000,000 bytes."""
    units = ("B", "kB", "MB", "GB", "TB")
    number, unit = float(size), 0
    while number >= 999.5 and unit < len(units) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.3g} {units[unit]}" if number < 999.5 else f"{number:.0f} {units[unit]}"


def free_space(folder: str | Path) -> int:
    """Free bytes where `folder` is or will be."""
    return shutil.disk_usage(_existing(folder)).free


class Lock:
    """One writer for a folder: a lock on the file `.lock`, which holds the writer's pid.

    It is a POSIX record lock: the kernel releases it when the process ends, and forked workers that outlive a run
    do not inherit it (unlike filelock's flock). It is also released when this process closes `.lock`
    anywhere else. Raises ResourceError that names the process that holds the lock.
    """

    _held: ClassVar[dict[Path, int]] = {}  # path -> pid; record locks never exclude their own process

    def __init__(self, folder: str | Path):
        self.path = Path(folder).resolve() / ".lock"

    def __enter__(self) -> Lock:
        with disk_errors(self.path):
            _make_folder(self.path.parent)
            if self._held.get(self.path) == os.getpid():  # a forked child inherits the table, not the lock
                raise self._refusal(os.getpid())
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._take()
            except BaseException:
                os.close(self._handle)
                raise
        self._held[self.path] = os.getpid()
        return self

    def _take(self) -> None:
        import fcntl

        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                raise
            raise self._refusal(os.read(self._handle, 32).decode("ascii", "replace").strip() or "?") from None
        os.ftruncate(self._handle, 0)
        os.write(self._handle, str(os.getpid()).encode())

    def _refusal(self, holder: object) -> ResourceError:
        hint = "wait for it or choose another folder"
        return ResourceError(f"is in use by process {holder}", where=self.path.parent, hint=hint)

    def __exit__(self, *_exc) -> None:
        self._held.pop(self.path, None)
        os.close(self._handle)
