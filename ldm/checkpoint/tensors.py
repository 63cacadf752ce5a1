"""Safetensors files, written: tensor by tensor, in shards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.checkpoint.safety import TORCH, Advance, placed_tensor, silent

if TYPE_CHECKING:
    import torch

HEADER_ROOM = 200  # bytes that one tensor's entry may take in a shard's header, beside its name


class Source(NamedTuple):
    """One tensor to write. `make` is called just before, so that a file of any size needs no second copy in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def source(tensor: torch.Tensor, dtype: torch.dtype, name: str, path: Path) -> Source:
    """A tensor to write, a floating one as `dtype`; writing it raises ModelError if it is not finite."""
    kind = dtype if tensor.is_floating_point() else tensor.dtype
    return Source(kind, tuple(tensor.shape), lambda: placed_tensor(name, tensor.detach(), dtype, "cpu", path))


def write_tensors(
    path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str], advance: Advance = silent
) -> None:
    """Write a safetensors file tensor by tensor; its bytes equal those of the safetensors library."""
    import torch

    names = {getattr(torch, name): code for code, name in TORCH.items()}
    order = sorted(sources, key=lambda name: (-sources[name].dtype.itemsize, name))
    header, position = {"__metadata__": dict(metadata)}, 0
    for name in order:
        one, start = sources[name], position
        position += one.size
        header[name] = {"dtype": names[one.dtype], "shape": list(one.shape), "data_offsets": [start, position]}
    raw = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        for name in order:
            tensor = sources[name].make().contiguous()
            handle.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            advance(sources[name].size)


def write_shards(
    folder: Path,
    stem: str,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    max_bytes: int,
    advance: Advance = silent,
) -> list[Path]:
    """Write `<stem>.safetensors`, or shards of at most `max_bytes` with the index that diffusers and transformers read.

    Floating tensors become `dtype`. Only a single tensor larger than `max_bytes` makes a larger file. Raises ModelError
    naming a tensor that is not finite.
    """
    shards = _split({name: (t.numel() * _width(t, dtype)) for name, t in tensors.items()}, max_bytes)
    names = [f"{stem}.safetensors"]
    if len(shards) > 1:
        names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    folder.mkdir(parents=True, exist_ok=True)
    for file, shard in zip(names, shards):
        content = {name: source(tensors[name], dtype, name, folder / file) for name in shard}
        write_tensors(folder / file, content, {"format": "pt"}, advance)
    if len(shards) > 1:
        total = sum(t.numel() * _width(t, dtype) for t in tensors.values())
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = folder / f"{stem}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return [path, *(folder / name for name in names)]
    return [folder / names[0]]


def _width(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    return dtype.itemsize if tensor.is_floating_point() else tensor.element_size()


def _split(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """The names in their order, in groups that each fit into `max_bytes`, header included."""
    shards, room = [[]], max_bytes
    for name, size in sizes.items():
        needed = size + HEADER_ROOM + len(name.encode())
        if shards[-1] and needed > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= needed
    return shards
