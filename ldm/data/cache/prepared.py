"""A prepared dataset: latents and texts in shards that training reads in sequence, for sets of any size.

CACHE/prepared.json                               what it was made of and with
CACHE/part-1-of-2/train-000004-64x96-512.safetensors   number, latent height x width, rows
CACHE/part-1-of-2/train-000006-64x96-512-5120.safetensors   the same, with repeats: an epoch has 5120 samples of it
CACHE/part-1-of-2/held-000005-64x96-3.safetensors      images that are held out for validation

A shard is an ordinary safetensors file, written as a whole and never changed. All its rows have one size: `mean` and
`std` (n, C, h, w), `sizes` (n, 6), `positions` (n,) in the source, `captions` (JSON bytes: [[id, [captions]], …]), and
where some have masks `mask` (n, 1, h, w), where an epoch has some several times `repeats` (n,), and
where embeddings are kept `text.states` (m, S, D), … of all captions, one after the other (the first row: ""). Its
metadata has a digest of all that. One process writes a part; several machines write several parts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm import files
from ldm.console import progress, warn
from ldm.data.sources.walk import PREPARED
from ldm.errors import DataError

if TYPE_CHECKING:
    import torch

FORMAT, REPEATED = 1, 2  # the second where images may come several times an epoch, which older versions would not see
SHARD_BYTES = 32 << 20  # of a shard at most: some of them are in memory at a time
ROWS = 4096  # of a shard at most
SECONDS = 300.0  # of work that a kill can cost: then shards are written, full or not
TEXT = "text."  # begins the names of tensors of captions


class ShardName(NamedTuple):
    """What the name of a shard says."""

    path: Path
    held: bool  # out for validation
    size: tuple[int, int]  # latent height, width
    rows: int
    samples: int  # rows, each as often as an epoch has it


@dataclass
class Row:
    """One image."""

    position: int  # in the source
    id: str
    captions: tuple[str, ...]
    sizes: tuple[int, ...]  # XL's time_ids
    mean: torch.Tensor  # (C, h, w)
    std: torch.Tensor
    texts: Mapping[str, torch.Tensor] = field(default_factory=dict)  # name -> (captions, …)
    held: bool = False
    mask: torch.Tensor | None = None  # uint8 (1, h, w): how much each latent is learned, 255 wholly
    repeats: int = 1  # times an epoch; of what is held out 1


def read_info(folder: str | Path) -> dict[str, Any]:
    """What a prepared dataset was made of. Raises DataError."""
    path = Path(folder, PREPARED)
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        if info["format"] not in (FORMAT, REPEATED):
            raise DataError(f"has format {info['format']}, this version reads {FORMAT} and {REPEATED}", where=path)
        return info
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError("cannot be read", where=path, hint="run ldm data cache again") from None


def list_shards(folder: str | Path) -> list[ShardName]:
    """The shards of all parts, by their names alone, in an order that is always the same."""
    return sorted(filter(None, map(_parsed, Path(folder).glob("part-*/*.safetensors"))))


def _parsed(path: Path) -> ShardName | None:
    kind, _, rest = path.stem.partition("-")
    try:
        _, size, rows, *more = rest.split("-")
        samples = more or [rows]
        height, width = map(int, size.split("x"))
        known = kind in ("train", "held") and len(samples) == 1
        return ShardName(path, kind == "held", (height, width), int(rows), int(samples[0])) if known else None
    except ValueError:
        return None


def read_shard(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a shard, whole and checked. Raises DataError."""
    import safetensors
    import safetensors.torch

    try:
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header["__metadata__"]["digest"] == _digest(tensors):
            return tensors
    except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError):
        pass
    raise DataError("is damaged or gone", where=path, hint="run ldm data cache again: it is made anew")


def captions_in(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, list[str]]]:
    """(id, captions) of each row of a shard."""
    return [(id, captions) for id, captions in json.loads(bytes(tensors["captions"].numpy()))]


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class PartWriter:
    """Writes one part of a prepared dataset; locked while the `with` block runs.

    On entry the part's shards are checked: damaged ones are removed, and `done` are the positions of all others.
    Raises ResourceError where another process has the part, or the disk is full.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES, seconds: float = SECONDS):
        self.folder, self.shard_bytes, self.seconds = folder, shard_bytes, seconds
        self.done: set[int] = set()
        self.damaged = self.written = 0  # shards; bytes
        self._pending: dict[tuple[bool, tuple[int, int]], list[Row]] = {}
        self._lock, self._since, self._number = files.Lock(folder), time.monotonic(), 0

    def __enter__(self) -> PartWriter:
        files.require_writable(self.folder)
        self._lock.__enter__()
        try:
            files.sweep(self.folder)
            self._check()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_exc) -> None:
        self._lock.__exit__()

    def _check(self) -> None:
        for path in progress(sorted(self.folder.glob("*.safetensors")), desc="checking the cache", unit="shard"):
            name = _parsed(path)
            try:
                if name is None:
                    raise DataError("has no name of a shard", where=path)
                self.done |= set(read_shard(path)["positions"].tolist())
                self._number = max(self._number, 1 + int(path.stem.split("-")[1]))
            except DataError as error:
                warn(f"{error}; removed")
                path.unlink()
                self.damaged += 1

    def put(self, row: Row) -> None:
        """Add a row; it is on the disk after `flush` at the latest."""
        group = (row.held, (row.mean.shape[-2], row.mean.shape[-1]))
        rows = self._pending.setdefault(group, [])
        rows.append(row)
        each = 2 * row.mean.nbytes + sum(tensor.nbytes for tensor in row.texts.values()) + 256
        if len(rows) >= min(ROWS, max(1, self.shard_bytes // each)):
            self._write(group)
        if time.monotonic() - self._since > self.seconds:
            self.flush()

    def flush(self) -> None:
        """Write all rows that wait."""
        for group in list(self._pending):
            self._write(group)
        self._since = time.monotonic()

    def _write(self, group: tuple[bool, tuple[int, int]]) -> None:
        import safetensors.torch

        rows = self._pending.pop(group)
        tensors = _stacked(rows)
        held, (height, width) = group
        samples = sum(row.repeats for row in rows)
        counts = f"{len(rows)}" if samples == len(rows) else f"{len(rows)}-{samples}"
        name = f"{'held' if held else 'train'}-{self._number:06d}-{height}x{width}-{counts}.safetensors"
        content = safetensors.torch.save(tensors, {"format": "pt", "digest": _digest(tensors)})
        files.atomic_write(self.folder / name, content)
        self._number += 1
        self.written += len(content)
        self.done |= {row.position for row in rows}


def _stacked(rows: list[Row]) -> dict[str, torch.Tensor]:
    import torch

    table = json.dumps([[row.id, list(row.captions)] for row in rows], ensure_ascii=False).encode()
    found = {
        "mean": torch.stack([row.mean for row in rows]),
        "std": torch.stack([row.std for row in rows]),
        "sizes": torch.tensor([row.sizes for row in rows], dtype=torch.float32),
        "positions": torch.tensor([row.position for row in rows]),
        "captions": torch.frombuffer(bytearray(table), dtype=torch.uint8),
    }
    if any(row.mask is not None for row in rows):
        whole = torch.full((1, *rows[0].mean.shape[-2:]), 255, dtype=torch.uint8)
        found["mask"] = torch.stack([whole if row.mask is None else row.mask for row in rows])
    if any(row.repeats != 1 for row in rows):
        found["repeats"] = torch.tensor([row.repeats for row in rows])
    names = rows[0].texts.keys()
    return found | {f"{TEXT}{name}": torch.cat([row.texts[name] for row in rows]) for name in names}
