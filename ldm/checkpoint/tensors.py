"""Read and write safetensors files: each byte is read once and hashed on the way, files are written in shards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.checkpoint.safety import Tensor, open_weights, read_header_bytes, read_json, refuse_pickle
from ldm.errors import ModelError

if TYPE_CHECKING:
    import torch

TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
TORCH |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32"}
TORCH |= {"U16": "uint16", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
HEADER_ROOM = 200  # bytes that one tensor's entry may take in a shard's header, beside its name

Advance = Callable[[int], object]  # called with the number of bytes that were just read or written


def silent(size: int) -> None:
    """Report nothing."""


def read_tensors(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    advance: Advance = silent,
    names: Container[str] | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of one safetensors file (all, or those in `names`), floating ones as `dtype` on `device`; its sha256.

    Every byte is read once, straight into the tensor's memory. Raises ModelError for a malformed header before any
    tensor is read, and for a tensor that is not finite in `dtype`, which it names.
    """
    digest, tensors = hashlib.sha256(), {}
    with open_weights(path) as handle:
        header, raw = read_header_bytes(handle, path)
        digest.update(raw)
        for name, entry in header.tensors.items():
            if names is None or name in names:
                tensors[name] = _placed(name, _tensor(handle, entry, digest, path), dtype, device, path)
            else:
                _pass_over(handle, entry.size, digest, path)
            advance(entry.size)
    return tensors, digest.hexdigest()


def _pass_over(handle, size: int, digest, path: Path) -> None:
    """Read and hash the next bytes without keeping them."""
    while size:
        block = handle.read(min(size, 1 << 20))
        if not block:
            raise ModelError("became shorter while it was read", where=path)
        digest.update(block)
        size -= len(block)


def _tensor(handle, entry: Tensor, digest, path: Path) -> torch.Tensor:
    import torch

    memory = torch.empty(entry.size, dtype=torch.uint8)
    view, position = memoryview(memory.numpy()), 0
    while position < entry.size:
        block = view[position : position + (1 << 24)]
        count = handle.readinto(block)
        if not count:
            raise ModelError("became shorter while it was read", where=path)
        digest.update(block[:count])
        position += count
    return memory.view(getattr(torch, TORCH[entry.dtype])).reshape(entry.shape)


def _placed(name: str, tensor: torch.Tensor, dtype: torch.dtype, device, path: Path) -> torch.Tensor:
    """The tensor on `device`, a floating one as `dtype`. Raises ModelError unless it is finite there."""
    placed = tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
    if not placed.isfinite().all():
        raise _not_finite(name, tensor, dtype, path)
    return placed


def _not_finite(name: str, tensor: torch.Tensor, dtype: torch.dtype, path: Path) -> ModelError:
    if not tensor.float().isfinite().all():
        return ModelError(f"{name!r} holds NaN or infinity", where=path, hint="get another copy of the model")
    what = f"{name!r} is too large for {str(dtype).removeprefix('torch.')}"
    return ModelError(what, where=path, hint="load it with --dtype bf16 or fp32")


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
    return Source(kind, tuple(tensor.shape), lambda: _placed(name, tensor.detach(), dtype, "cpu", path))


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


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files that hold one component: [single file] or [index.json, shards…].

    Full precision comes before an `.fp16` variant. Raises ModelError where there is none, naming a pickle if that is
    all there is, and for an index that is malformed or names files that are missing or outside the folder.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for single in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        variant = single.removeprefix(stem).removesuffix("safetensors")
        index = f"{stem}.safetensors.index{variant}json"
        if single in names:
            return [folder / single]
        if index in names:
            return [folder / index, *_shards(folder / index)]
    for name in sorted(names):
        if name.startswith((stem, "pytorch_model")):
            refuse_pickle(folder / name)
    raise ModelError("no weights here", where=folder / f"{stem}.safetensors", hint="get the whole model folder")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not files or not all(isinstance(file, str) for file in files):
        raise ModelError("has no weight_map", where=index, hint="get the file again")
    shards = [index.parent / file for file in sorted(set(files))]
    for shard in shards:
        if shard.parent != index.parent or shard.suffix != ".safetensors" or shard.name in ("", ".."):
            raise ModelError(f"names {shard.name!r}, which is no safetensors file beside it", where=index)
        if not shard.is_file():
            raise ModelError(f"names {shard.name!r}, which is missing", where=index, hint="get the whole model folder")
    return shards
