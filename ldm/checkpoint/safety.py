"""Files of models and checkpoints, read and checked: safetensors (each byte once, hashed on the way), settings,
sha256 manifests; pickles are recognised and refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ldm.errors import ModelError
from ldm.files import atomic_write, sha256

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
HEAD = 4096  # bytes that are read to recognise a file, at most
MAX_HEADER = 16 << 20  # bytes; the header of SDXL's U-Net has 0.3 MB
MAX_MARKS = 500_000  # of { [ and : in a header (a tensor has 8): it is parsed within a second
MAX_NAME = 500  # characters of a tensor's name
MAX_NUMBERS = 1 << 48  # in one tensor
MAX_JSON = 16 << 20  # bytes of a config, index or vocabulary
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
ITEM_BYTES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1}
TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
TORCH |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32"}
TORCH |= {"U16": "uint16", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
USE_SAFETENSORS = "get the .safetensors version, or convert the file where you trust it"
GET_AGAIN = "get the file again"

Advance = Callable[[int], object]  # called with the number of bytes that were just read or written


def silent(size: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class Tensor:
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    """The table of contents of a safetensors file; tensors in the order of their bytes, without holes."""

    size: int  # bytes before the first tensor
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


def refuse_pickle(path: str | Path) -> None:
    """Raise ModelError if the file is a pickle by its name or by its first 4 KB."""
    path = Path(path)
    kind = _other_format(_head(path))
    if path.suffix.lower() in PICKLES:
        kind = kind if kind and "pickle" in kind else "is a pickle file by its name"
    if kind:
        hint = USE_SAFETENSORS if "pickle" in kind else GET_AGAIN
        raise ModelError(f"{kind}; only safetensors is opened" if "pickle" in kind else kind, where=path, hint=hint)


def _head(path: Path) -> bytes:
    _check_kind(path)
    try:
        with path.open("rb", buffering=0) as handle:
            return handle.read(HEAD) or b""
    except FileNotFoundError:
        raise ModelError("no such file", where=path) from None
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=path) from None


def _check_kind(path: Path) -> None:
    """Raise ModelError for a folder, and for a pipe or device, which might never end."""
    if path.exists() and not path.is_file():
        raise ModelError("is a folder, not a file" if path.is_dir() else "is not an ordinary file", where=path)


def _other_format(head: bytes) -> str | None:
    """The format of these first bytes, if it is known and not safetensors; else None."""
    if head[:4] == b"PK\x03\x04":
        return "is a zip archive (PyTorch's pickle format)"
    if head[8:9] == b"{":  # a safetensors header starts here; the eight bytes before it are its length
        return None
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a Python pickle"
    if head[257:262] == b"ustar":
        return "is a tar archive (PyTorch's first pickle format)"
    if head.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the weights (run `git lfs pull`)"
    if head.lstrip()[:1] == b"<":
        return "is a web page, not weights"
    if head[:4] == b"GGUF":
        return "is a GGUF file, which is not supported"
    return None


def read_header(path: str | Path) -> Header:
    """Read the header of a safetensors file; check it, and that the file is exactly as long as it says.

    Raises ModelError (pickle, truncated, malformed) before any tensor is read, with bounded time and memory.
    """
    path = Path(path)
    try:
        with open_weights(path) as handle:
            return read_header_bytes(handle, path)[0]
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror})", where=path) from None


def open_weights(path: Path) -> BinaryIO:
    """The file, opened to be read. Raises ModelError for a pickle by its name, and for what is no file."""
    if path.suffix.lower() in PICKLES or not path.is_file():
        refuse_pickle(path)
    return path.open("rb", buffering=0)


def read_header_bytes(handle: BinaryIO, path: Path) -> tuple[Header, bytes]:
    """The header at the start of an open file, and its bytes; the first tensor is read next. Raises ModelError."""
    size, start = path.stat().st_size, handle.read(8)
    if len(start) < 8:
        raise _malformed("has no header", path)
    length = int.from_bytes(start, "little")
    if length > min(size - 8, MAX_HEADER):
        reason = f"does not fit into {size} bytes" if length > size - 8 else "is larger than any model's"
        raise _malformed(f"its header of {length} bytes {reason}", path)
    raw = handle.read(length)
    return _parse(raw, size, path), start + raw


def _parse(raw: bytes, size: int, where: Path) -> Header:
    """Check the header's JSON against the format; `size` is the whole file's. Raises ModelError with the reason."""
    if sum(raw.count(mark) for mark in (b"{", b"[", b":")) > MAX_MARKS:
        raise _malformed("its header lists more than any model's", where)
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, _Duplicate) else "its header is not valid JSON"
        raise _malformed(reason, where) from None
    if not isinstance(table, dict) or raw[:1] != b"{":
        raise _malformed("its header is not a table", where)
    metadata = table.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _malformed("its metadata is not text", where)
    start = position = 8 + len(raw)
    entries = ((name, _entry(name, entry, start, where)) for name, entry in table.items())
    tensors = dict(sorted(entries, key=lambda item: (item[1].begin, item[1].size)))
    for name, tensor in tensors.items():
        if tensor.begin != position:
            problem = "overlaps another tensor" if tensor.begin < position else "follows a hole"
            raise _malformed(f"{name!r} {problem}", where)
        position += tensor.size
    if position != size:
        what = "is truncated" if size < position else "has bytes after its last tensor"
        raise _malformed(f"{what} ({size} bytes, its header says {position})", where)
    return Header(start, tensors, metadata)


def _entry(name: str, entry: object, start: int, where: Path) -> Tensor:
    """One entry of the header, its size checked against its shape; the tensors' bytes begin at `start`."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise _malformed(f"a tensor has the name {name[:80]!r} … of {len(name)} characters", where)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"the entry of {name!r} is not dtype, shape and data_offsets", where)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _malformed(f"{name!r} has the unknown dtype {str(dtype)[:20]!r}", where)
    if not (_naturals(shape) and len(shape) <= 16 and _naturals(offsets) and len(offsets) == 2):
        raise _malformed(f"{name!r} has a bad shape or offsets", where)
    if math.prod(max(side, 1) for side in shape) > MAX_NUMBERS:
        raise _malformed(f"{name!r} is too large: {shape}", where)
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _malformed(f"the size of {name!r} does not match its shape", where)
    return Tensor(dtype, tuple(shape), start + begin, end - begin)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in value)


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Duplicate(f"its header lists {name[:80]!r} twice")
    return table


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _malformed(reason: str, where: Path) -> ModelError:
    refuse_pickle(where)  # a file of another format is called by its own name
    return ModelError(f"is not a sound safetensors file: {reason}", where=where, hint=GET_AGAIN)


def read_tensors(
    path: Path,
    dtype: torch.dtype,
    device: torch.device | str,
    advance: Advance = silent,
    names: Container[str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors of one safetensors file (all, or those in `names`), floating ones as `dtype` on `device`; its sha256.

    `dtypes` has other dtypes for some.

    Raises ModelError for a malformed header before any tensor is read, and for a tensor that is not finite in `dtype`.
    """
    digest, tensors = hashlib.sha256(), {}
    with open_weights(path) as handle:
        header, raw = read_header_bytes(handle, path)
        digest.update(raw)
        for name, entry in header.tensors.items():
            if names is None or name in names:
                own = dtype if dtypes is None else dtypes.get(name, dtype)
                tensors[name] = placed_tensor(name, _read_tensor(handle, entry, digest, path), own, device, path)
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


def _read_tensor(handle, entry: Tensor, digest, path: Path) -> torch.Tensor:
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


def placed_tensor(name: str, tensor: torch.Tensor, dtype: torch.dtype, device, path: Path) -> torch.Tensor:
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


def read_json(path: str | Path) -> dict:
    """A JSON object from a model folder. Raises ModelError with the line of bad syntax."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if _is_short(path) else None
    except (OSError, RecursionError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(value, dict):
        _check_kind(path)
        raise ModelError(
            "is not a table of settings" if _is_short(path) else "is too large for a settings file", where=path
        )
    return value


def _is_short(path: Path) -> bool:
    """Whether this is an ordinary file of at most MAX_JSON bytes; raises OSError where nothing is there."""
    return path.stat().st_size <= MAX_JSON and path.is_file()


def _unreadable(path: Path, error: Exception) -> ModelError:
    if isinstance(error, FileNotFoundError):
        return ModelError("no such file", where=path, hint="get the whole model folder")
    if isinstance(error, json.JSONDecodeError):
        return ModelError(f"is not valid JSON ({error.msg})", where=f"{path}:{error.lineno}")
    return ModelError(f"cannot be read ({type(error).__name__})", where=path)


def write_manifest(folder: str | Path, names: Sequence[str] | None = None) -> Path:
    """Write `manifest.json`, the sha256 and size of every file below `folder` (or of `names`)."""
    folder = Path(folder)
    if names is None:
        names = sorted(
            p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
        )
    files = {name: {"sha256": sha256(folder / name), "size": (folder / name).stat().st_size} for name in names}
    return atomic_write(folder / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Path in the folder -> sha256 and size, by `manifest.json`; {} without one. Raises ModelError for a bad one."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["files"].items()
        files = {str(name): {"sha256": str(entry["sha256"]), "size": int(entry["size"])} for name, entry in table}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ModelError("the manifest is damaged", where=path, hint="get the folder again") from None
    for name in files:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ModelError(f"the manifest names a file outside its folder ({name})", where=path)
    return files


def check_manifest(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Like `read_manifest`, but raises ModelError for the first file that is missing or differs in size."""
    files = read_manifest(folder)
    for name, entry in files.items():
        file = Path(folder, name)
        if not file.is_file():
            raise ModelError("listed in the manifest, but missing", where=file, hint="get the folder again")
        if file.stat().st_size != entry["size"]:
            raise ModelError("does not match the manifest's size", where=file, hint="get the file again")
    return files


def verify_manifest(
    folder: str | Path, advance: Callable[[int], object] = lambda size: None
) -> dict[str, dict[str, Any]]:
    """Like `check_manifest`, but raises ModelError also for the first file whose content differs."""
    files = check_manifest(folder)
    for name, entry in files.items():
        try:
            digest = sha256(Path(folder, name), advance)
        except OSError as error:
            raise ModelError(f"cannot be read ({error.strerror or error})", where=Path(folder, name)) from None
        if digest != entry["sha256"]:
            raise ModelError(
                "does not match the manifest's sha256", where=Path(folder, name), hint="get the file again"
            )
    return files
