"""Where and in what precision the networks run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
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
    """The torch dtype of a name or a dtype (see `check_dtype`); `auto` is bf16 on a GPU that has it, else fp32."""
    import torch

    name = check_dtype(name)
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise ConfigError("fp16 is not supported on a CPU", where="dtype", hint="use bf16 or fp32")
    return getattr(torch, DTYPES[name])


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is quicker than float32 here (CUDA with bf16; CPUs with AVX512-BF16 or AMX)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no memory left; PyTorch has no type of its own for that on a CPU."""
    import torch

    of_memory = "can't allocate memory" in str(error) or "not enough memory" in str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (isinstance(error, RuntimeError) and of_memory)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in the machine."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
