"""Where and in what precision the networks run."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
CGROUP = Path("/sys/fs/cgroup")
AMPERE = (8, 0)  # compute capability from which on a card has bf16
QUANTIZATIONS = ("int8",)  # of weights, by torchao
UNET_BACKENDS = ("torch", "openvino")  # by whose code a U-Net is computed
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
SPELLINGS = {word: short for short, full in DTYPES.items() for word in (short, full, f"torch.{full}")}
SPELLINGS |= {"half": "fp16", "torch.half": "fp16", "float": "fp32", "torch.float": "fp32"}


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` takes CUDA, then MPS, then the CPU. Raises ConfigError if it is not there."""
    import torch

    kind, _, number = name.partition(":")
    if kind not in DEVICES or (":" in name and (kind == "auto" or not number.isdecimal())):
        raise ConfigError(f"unknown device {name!r}", where="device", hint=nearest(name, DEVICES))
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if kind == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if present[d]))
    if not present[kind] or (kind == "cuda" and int(number or 0) >= torch.cuda.device_count()):
        raise ConfigError(f"{name} is not available here", where="device", hint="use --device auto or cpu")
    return torch.device(name)


def check_quantization(kind: Any, installed: bool = True) -> str | None:
    """int8, or None. Raises ConfigError for any other value and, if `installed`, where torchao is not there."""
    if kind is None:
        return None
    if kind not in QUANTIZATIONS:
        what = f"expected {' or '.join(QUANTIZATIONS)}, got {kind!r:.80}"
        raise ConfigError(what, where="quantization")
    if installed and find_spec("torchao") is None:
        hint = "pip install 'ldm-pipeline[int8]', or leave it out"
        raise ConfigError("the package torchao is not installed", where="quantization", hint=hint)
    return str(kind)


def check_unet_backend(name: Any, device: torch.device) -> str:
    """torch or openvino. Raises ConfigError for any other value, and where openvino is not there or has no device."""
    if name not in UNET_BACKENDS:
        raise ConfigError(f"expected {' or '.join(UNET_BACKENDS)}, got {name!r:.80}", where="backend")
    if name == "openvino" and device.type != "cpu":
        raise ConfigError(f"openvino is for CPUs, not for {device.type}", where="backend", hint="use device cpu")
    if name == "openvino" and find_spec("openvino") is None:
        hint = "pip install 'ldm-pipeline[openvino]', or leave it out"
        raise ConfigError("the package openvino is not installed", where="backend", hint=hint)
    return str(name)


def check_dtype(value: Any, where: str = "dtype") -> str:
    """auto, fp32, fp16 or bf16, from any spelling: float32, torch.float32, half, a torch dtype. Raises ConfigError."""
    word = str(value).lower()
    if word != "auto" and word not in SPELLINGS:
        hint = nearest(word[:80], ("auto", *SPELLINGS))
        raise ConfigError(f"unknown dtype {str(value)!r:.80}", where=where, hint=hint)
    return SPELLINGS.get(word, word)


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, fp16 or bf16; any other dtype by torch's name."""
    return SPELLINGS.get(str(dtype), str(dtype))


def pick_dtype(name: Any, device: torch.device) -> torch.dtype:
    """The torch dtype of a name or a dtype (see `check_dtype`); `auto` is bf16 on a GPU that has it, on others fp16."""
    import torch

    name = check_dtype(name)
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if fast_bf16(device) else torch.float16
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 is not supported on a CPU", where="dtype", hint="use bf16 or fp32")
    return getattr(torch, DTYPES[name])


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is quicker than float32 here (CUDA from Ampere on; CPUs with AVX512-BF16 or AMX)."""
    import torch

    if device.type == "cuda":  # older cards emulate it, and torch.cuda.is_bf16_supported() counts that
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks here for code of this device; None where it lacks nothing."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")  # as torch looks for one
        return None if shutil.which(compiler) else f"a C++ compiler ({compiler})"
    return None if device.type != "cuda" or find_spec("triton") else "the package triton"


def half_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The 16 bits that a training's `precision` means, None for fp32; `auto` is bf16 where it is faster than fp32,
    else fp16 with CUDA."""
    import torch

    if precision == "auto":
        precision = "bf16" if fast_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)


def keep_memory() -> None:
    """Tell glibc's malloc to keep what this process frees; elsewhere nothing.

    By itself it gives large blocks and the free end of the heap back to the system, which hands them out again page by
    page and zeroed. Measured (two cores; a step of fine-tuning with 8 images of 128x128, encoded in each step):
    0.278 s with this, 0.387 s without, of which 0.04 s in the autoencoder and the rest wherever memory is taken next;
    16 images of `ldm bench render`: 10.4 s and 10 page faults, 11.2 s and 441,000 without.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # bytes of a block; more is not taken
    mallopt(M_TRIM_THRESHOLD, 1 << 29)  # free bytes at the end of the heap: what is kept counts as taken


@contextmanager
def without_collector() -> Iterator[None]:
    """Without Python's garbage collector while the block imports libraries: what they make stays.

    Else it looks through all of them again and again. Measured (one thread, processor time of a cold `ldm generate`
    over that of importing torch, transformers' CLIP and diffusers' autoencoder, medians of 4 in alternation): 1.38
    without this, 1.14 with this and no last collection when the command ends, 1.21 with the latter alone.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_tf32() -> Iterator[None]:
    """CUDA's convolutions in fp32 itself, not in TF32, while the block runs."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def sent(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor on a device (and in a dtype); a GPU fetches it from the CPU while this process goes on."""
    if dtype is not None:
        tensor = tensor.to(dtype)
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()  # else the copy waits until the GPU has done all that it was given before
    return tensor.to(device, non_blocking=device.type != "mps")


OUT_OF_MEMORY = (  # what PyTorch says where it has no type of its own for it: on a CPU, of MPS, of CUDA's libraries
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",  # CUBLAS_STATUS_…, CUDNN_STATUS_…
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)


def let_go() -> None:
    """Give a GPU the memory back that PyTorch's allocator keeps and nothing uses."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, with what PyTorch's allocator keeps there and nothing uses, or in the machine."""
    import torch

    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return total_memory(device) // 2
    return min(free, _left_of_limit(free))


def _left_of_limit(free: int) -> int:
    """Bytes that the limit of this process's cgroup leaves, without what the kernel keeps of files; else `free`."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat["inactive_file"]))
    except (OSError, ValueError, LookupError):  # another system; no limit is "max"
        return free


def total_memory(device: torch.device) -> int:
    """Bytes that a GPU has, or the machine, which is what MPS uses."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
