"""Groups of tensors by key in safetensors files that check themselves: a damaged entry counts as missing.

A shard is an ordinary safetensors file, written as a whole and never changed: tensors `KEY.NAME`, and in its metadata
KEY -> digest of the key and of all its names, types, shapes and bytes. So a flipped bit anywhere, in the header too,
loses the entries that it hits and never returns a wrong one. `index.json` lists the shards; it can be rebuilt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch

from ldm import files
from ldm.console import warn

INDEX, FORMAT = "index.json", 1
PATTERN = "ldm-cache-*.safetensors"
SHARD_BYTES = 256 << 20  # of a shard at most, and of what waits in memory to be written
SECONDS = 60.0  # of work that a kill can cost: then a shard is written, full or not
ENTRIES = 1 << 16  # in a shard at most: its header stays below 30 MB
HEADER_BYTES = 160  # of a shard's header for each tensor, and for each digest
ITEM_BYTES = {"I64": 8, "F32": 4, "BF16": 2, "F16": 2, "BOOL": 1, "U8": 1}
_TORCH = {"I64": "int64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "BOOL": "bool", "U8": "uint8"}

Layout = tuple[tuple[str, str, tuple[int, ...]], ...]  # (name, type, shape) of each tensor, sorted by name


class _Place(NamedTuple):
    """Where an entry's bytes are."""

    shard: int
    digest: str
    layout: Layout
    begins: tuple[int, ...]  # of each tensor, from the start of the file


class Shards:
    """A folder of shards, locked for this process while the `with` block runs.

    Raises ResourceError where another process holds it, where the disk is full or cannot be written.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES, seconds: float = SECONDS):
        self.folder, self.shard_bytes, self.seconds = Path(folder), shard_bytes, seconds
        self._lock = files.Lock(self.folder)
        self._table: dict[str, _Place] = {}
        self._pending: dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]] = {}
        self._pending_bytes, self._since = 0, 0.0
        self._listed: dict[str, dict[str, int]] = {}  # shard -> bytes, entries

    def __enter__(self) -> Shards:
        files.require_writable(self.folder)
        self._lock.__enter__()
        try:
            with files.disk_errors(self.folder):
                files.sweep(self.folder)
                self._open()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def reload(self) -> None:
        """Read the shards that another process has just written and checked; takes no lock."""
        for path in sorted(self.folder.glob(PATTERN), key=lambda path: _number(path.name)):
            if table := _read_header(path):
                self._adopt(path, *table)

    def __exit__(self, *_exc) -> None:
        self._lock.__exit__()

    def __contains__(self, key: str) -> bool:
        return key in self._pending or key in self._table

    def known(self) -> set[str]:
        """All keys, damaged entries included."""
        return {*self._table, *self._pending}

    @property
    def bytes(self) -> int:
        """Size of the shards on the disk and of the entries that wait to be written."""
        return sum(shard["bytes"] for shard in self._listed.values()) + self._pending_bytes

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        """The entry's tensors, read and checked; None where it is missing or damaged (a damaged one is removed)."""
        if key in self._pending:
            return {name: _tensor(*stored) for name, stored in self._pending[key].items()}
        place = self._table.get(key)
        if place is None:
            return None
        spans = [(_size(code, shape), begin) for (_, code, shape), begin in zip(place.layout, place.begins)]
        try:
            with self._path(place.shard).open("rb", buffering=0) as handle:
                raw = [os.pread(handle.fileno(), size, begin) for size, begin in spans]
        except OSError:
            raw = []
        if _digest(key, place.layout, raw) != place.digest:
            del self._table[key]
            return None
        return {name: _tensor(code, shape, data) for (name, code, shape), data in zip(place.layout, raw)}

    def put(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store an entry, replacing the one under this key; it is on the disk after `flush` at the latest."""
        entry = {name: _stored(tensors[name]) for name in sorted(tensors)}
        size = sum(len(data) for _, _, data in entry.values()) + HEADER_BYTES * (len(entry) + 1)
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self.flush()
        if not self._pending:
            self._since = time.monotonic()
        self._pending[key] = entry
        self._pending_bytes += size
        if len(self._pending) >= ENTRIES or time.monotonic() - self._since >= self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write the waiting entries as one more shard, then the index."""
        if not self._pending:
            return
        number = 1 + max((_number(name) for name in self._listed), default=-1)
        path = self._path(number)
        raw, order = _header(self._pending)

        def write(tmp: Path) -> None:
            with tmp.open("wb") as handle:
                handle.write(raw)
                for key, name in order:
                    handle.write(self._pending[key][name][2])

        files.atomic_write(path, write)
        self._adopt(path, json.loads(raw[8:]), len(raw))
        self._pending, self._pending_bytes = {}, 0
        self._write_index()

    def _path(self, number: int) -> Path:
        return self.folder / PATTERN.replace("*", f"{number:05d}")

    def _open(self) -> None:
        """Read all headers. Damaged shards are removed: their entries have to be made again."""
        listed, paths = self._read_index(), sorted(self.folder.glob(PATTERN), key=lambda path: _number(path.name))
        for path in paths:
            table = _read_header(path) if _number(path.name) >= 0 else None
            if table is None:
                warn(f"{path}: is damaged; what it held is made again")
                path.unlink()
            else:
                self._adopt(path, *table)
        for name in sorted(listed.keys() - {path.name for path in paths}):
            warn(f"{self.folder / name}: is gone; what it held is made again")
        if listed != self._listed:
            self._write_index()

    def _adopt(self, path: Path, table: dict, offset: int) -> None:
        """Add the entries of a shard to the table; they replace those of older shards."""
        number, digests = _number(path.name), table.pop("__metadata__", {})
        entries: dict[str, dict[str, dict]] = {}
        for full, tensor in table.items():
            key, _, name = full.partition(".")
            entries.setdefault(key, {})[name] = tensor
        for key, tensors in entries.items():
            names = sorted(tensors)
            layout = tuple((name, tensors[name]["dtype"], tuple(tensors[name]["shape"])) for name in names)
            begins = tuple(offset + tensors[name]["data_offsets"][0] for name in names)
            if key in digests and all(code in ITEM_BYTES for _, code, _ in layout):
                self._table[key] = _Place(number, digests[key], _interned(layout), begins)
        self._listed[path.name] = {"bytes": path.stat().st_size, "entries": len(entries)}

    def _read_index(self) -> dict[str, dict[str, int]]:
        path = self.folder / INDEX
        try:
            shards = json.loads(path.read_bytes())["shards"]
            return {str(name): dict(shard) for name, shard in shards.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            warn(f"{path}: is damaged; it is made again from the shards")
            return {}

    def _write_index(self) -> None:
        index = {"format": FORMAT, "shards": self._listed}
        files.atomic_write(self.folder / INDEX, json.dumps(index, indent=1) + "\n")


def _number(name: str) -> int:
    """The number in a shard's name, or -1."""
    digits = name.removeprefix("ldm-cache-").removesuffix(".safetensors")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 12 else -1


_layouts: dict[Layout, Layout] = {}


def _interned(layout: Layout) -> Layout:
    """The shared copy of a layout: a dataset has few layouts and many entries."""
    return _layouts.setdefault(layout, layout)


def _size(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES[code]


def _digest(key: str, layout: Layout, raw: list[bytes]) -> str:
    digest = hashlib.blake2b(repr((key, layout)).encode(), digest_size=16)
    for data in raw:
        digest.update(data)
    return digest.hexdigest()


def _stored(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """(type, shape, bytes) of a tensor of one of the types above."""
    code = {getattr(torch, name): code for code, name in _TORCH.items()}[tensor.dtype]
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return code, tuple(tensor.shape), data


def _tensor(code: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, _TORCH[code])).reshape(shape)


def _header(entries: Mapping[str, dict[str, tuple]]) -> tuple[bytes, list[tuple[str, str]]]:
    """A shard's first bytes, and (key, name) of its tensors in their order: wide types first, so that all align."""
    order = [(key, name) for key, entry in entries.items() for name in entry]
    order.sort(key=lambda place: -ITEM_BYTES[entries[place[0]][place[1]][0]])
    metadata, position = {"format": f"ldm-cache-{FORMAT}"}, 0
    for key, entry in entries.items():
        layout = tuple((name, code, shape) for name, (code, shape, _) in entry.items())
        metadata[key] = _digest(key, layout, [data for _, _, data in entry.values()])
    table: dict[str, dict] = {"__metadata__": metadata}
    for key, name in order:
        code, shape, data = entries[key][name]
        span = [position, position := position + len(data)]
        table[f"{key}.{name}"] = {"dtype": code, "shape": list(shape), "data_offsets": span}
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order


def _read_header(path: Path) -> tuple[dict, int] | None:
    """(table, bytes before the first tensor) of a safetensors file; None where it is damaged."""
    try:
        with safetensors.safe_open(path, "np"):  # checks offsets, shapes and the file's length
            pass
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return json.loads(handle.read(length)), 8 + length
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
