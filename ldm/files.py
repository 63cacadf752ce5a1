"""Files that are never half-written: atomic files and folders, sha256 manifests, locks, names, free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import typing
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ldm.errors import ModelError, ResourceError

MANIFEST = "manifest.json"


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one line with what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        todo = {
            errno.ENOSPC: "free some disk space",
            errno.EDQUOT: "free some of your disk quota",
            errno.EFBIG: "raise the limit on the size of files",
            errno.EROFS: "choose a folder that can be written",
            errno.EACCES: "choose a folder that can be written",
        }.get(error.errno)
        raise ResourceError(f"cannot be written ({error.strerror or error})", where=path, todo=todo) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def atomic_write(path: str | Path, data: bytes | str | Callable[[Path], None], overwrite: bool = True) -> Path:
    """Write a whole file or nothing: a temporary name beside it, fsync, rename.

    `data` is the content, or a function that writes the path it is given. With `overwrite=False` an existing file is
    kept and FileExistsError raised. Raises ResourceError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    tmp = path.with_name(f".tmp-{os.getpid()}-{path.name}"[:200] + path.suffix)
    try:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(data):
                data(tmp)
            else:
                tmp.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
            _fsync_file(tmp)
            tmp.chmod(0o666 & ~_umask())  # safetensors leaves 0600
            if overwrite:
                tmp.replace(path)
            else:
                os.link(tmp, path)
            _fsync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def atomic_folder(target: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` when the block ends well; on any error nothing is left of it.

    An existing `target` is moved aside first and removed after the new one is in place.
    """
    target = Path(target)
    tmp, old = (target.with_name(f".{kind}-{os.getpid()}-{target.name}") for kind in ("tmp", "old"))
    try:
        with _disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir()
            yield tmp
            for path in sorted(tmp.rglob("*"), reverse=True):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
                    _fsync_file(path)
                else:
                    _fsync_folder(path)
            _fsync_folder(tmp)
            if target.exists():
                target.rename(old)
            tmp.rename(target)
            _fsync_folder(target.parent)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def sweep(folder: str | Path) -> list[str]:
    """Remove what killed writers left (`.tmp-…`), put back what they moved aside; returns the names."""
    folder, swept = Path(folder), []
    for path in sorted(folder.glob(".old-*")):
        target = folder / path.name.split("-", 2)[2]
        if path.is_dir() and not target.exists():
            path.rename(target)
            swept.append(path.name)
    for path in [*folder.glob(".tmp-*"), *folder.glob(".old-*")]:
        swept.append(path.name)
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return swept


def sha256(path: str | Path, advance: Callable[[int], object] = lambda size: None) -> str:
    """Hex digest of a file, streamed; `advance` hears of the bytes read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def write_manifest(folder: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write `manifest.json`, the sha256 and size of every file below `folder` (or of `names`)."""
    folder = Path(folder)
    if names is None:
        names = sorted(
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
        )
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    return atomic_write(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def verify_manifest(folder: str | Path, advance: Callable[[int], object] = lambda size: None) -> dict[str, dict]:
    """Check every file that `manifest.json` lists; {} where there is no manifest.

    Raises ModelError naming the first file that is missing, of another size or of other content.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {str(name): (str(entry["sha256"]), int(entry["size"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError("the manifest is damaged", where=path, todo="get the folder again") from None
    for name, (digest, size) in listed.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ModelError(f"the manifest names a file outside its folder ({name})", where=path)
        if not file.is_file():
            raise ModelError("listed in the manifest, but missing", where=file, todo="get the folder again")
        if file.stat().st_size != size or sha256(file, advance) != digest:
            raise ModelError("does not match the manifest's sha256", where=file, todo="get the file again")
    return files


def slug(text: str) -> str:
    """`[a-z0-9-]{1,60}` from any text, `image` when nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "image"


def unused_path(folder: str | Path, stem: str, suffix: str) -> Path:
    """The first of stem.png, stem-2.png, stem-3.png … that does not exist in `folder`."""
    folder, number = Path(folder), 1
    path = folder / f"{stem}{suffix}"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path


def require_writable(folder: str | Path) -> None:
    """Raise ResourceError unless a file can be created in `folder` (or its nearest existing parent)."""
    probe = Path(folder).absolute()
    while not probe.exists():
        probe = probe.parent
    if not probe.is_dir():
        raise ResourceError("is a file, not a folder", where=probe, todo="choose another folder")
    name = probe / f".tmp-{os.getpid()}-probe"
    try:
        with _disk_errors(Path(folder)):
            name.touch()
    finally:
        with contextlib.suppress(OSError):
            name.unlink(missing_ok=True)


def require_space(folder: str | Path, needed: int) -> None:
    """Raise ResourceError unless `needed` bytes are free where `folder` is or will be."""
    probe = Path(folder).absolute()
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
        raise ResourceError(
            f"{needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB are free", where=folder, todo="free some disk space"
        )


class Lock:
    """One writer for a folder: holds `.lock` with its pid; the lock of a dead process is taken over.

    A record lock: the kernel drops it with its process, and worker processes that outlive a killed run do not inherit
    it. Raises ResourceError naming the process that holds it.
    """

    _held: typing.ClassVar[set[Path]] = set()  # by this process, to which record locks never object

    def __init__(self, folder: str | Path):
        self.path = Path(folder).resolve() / ".lock"

    def __enter__(self) -> Lock:
        import fcntl

        with _disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path in self._held:
                raise self._refusal(os.getpid())
            self._handle = self.path.open("r+" if self.path.exists() else "w+")
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._handle.read().strip() or "?"
            self._handle.close()
            raise self._refusal(holder) from None
        self._held.add(self.path)
        self._handle.truncate(0)
        self._handle.write(str(os.getpid()))
        self._handle.flush()
        return self

    def _refusal(self, holder: object) -> ResourceError:
        todo = "wait for it or choose another folder"
        return ResourceError(f"is in use by process {holder}", where=self.path.parent, todo=todo)

    def __exit__(self, *_exc) -> None:
        self._held.discard(self.path)
        self._handle.close()
