"""Where and how precisely to compute, on machines that this one is not."""

import gc
import platform
import subprocess
import sys

import pytest
import torch

from ldm.device import (
    check_dtype,
    dtype_name,
    fast_bf16,
    free_memory,
    half_dtype,
    is_out_of_memory,
    pick_device,
    pick_dtype,
    without_collector,
)
from ldm.errors import ConfigError


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine one with or without CUDA, MPS and bfloat16 on the GPU."""

    def machine(cuda=False, mps=False, bf16=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # counts cards that emulate it
        cards = [(9, 0), (7, 5)] if bf16 else [(7, 5), (9, 0)]
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cards[torch.device(device).index or 0])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return machine


@pytest.mark.parametrize(
    ("has", "name", "picked"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": True, "mps": True}, "auto", "cuda"),
        ({"mps": True}, "auto", "mps"),
        ({"cuda": True}, "cpu", "cpu"),
        ({"cuda": True}, "cuda", "cuda"),
        ({"cuda": True}, "cuda:1", "cuda:1"),
        ({"mps": True}, "mps", "mps"),
    ],
)
def test_devices(has, name, picked, machine):
    machine(**has)
    assert pick_device(name) == torch.device(picked)


def test_auto_is_the_default(machine):
    machine()
    assert pick_device().type == "cpu"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cdua", "device: unknown device 'cdua'; did you mean 'cuda'?"),
        ("", "device: unknown device ''; choose from: auto, cpu, cuda, mps"),
        ("xpu:0", "unknown device 'xpu:0'"),
        ("cuda", "device: cuda is not available here; use --device auto or cpu"),
        ("cuda:3", "device: cuda:3 is not available here"),
        ("mps", "device: mps is not available here"),
        ("cpu:x", "unknown device 'cpu:x'"),
        ("auto:1", "unknown device 'auto:1'"),
    ],
)
def test_devices_that_are_not_there(name, told, machine):
    machine()
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", ["cuda:x", "cuda:", "cuda:-1", "cuda:1:1", "cuda:2"])
def test_numbers_that_no_gpu_has(name, machine):
    machine(cuda=True)
    with pytest.raises(
        ConfigError, match=f"{name} is not available" if name == "cuda:2" else f"unknown device '{name}'"
    ):
        pick_device(name)


@pytest.mark.parametrize(
    ("name", "device", "bf16", "picked"),
    [
        ("auto", "cpu", True, torch.float32),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("auto", "cuda:1", True, torch.float16),  # of the card that is used, whatever the first one has
        ("auto", "mps", True, torch.float16),
        ("fp32", "cuda", True, torch.float32),
        ("fp16", "cuda", True, torch.float16),
        ("bf16", "cpu", False, torch.bfloat16),
    ],
)
def test_dtypes(name, device, bf16, picked, machine):
    machine(cuda=True, bf16=bf16)
    assert pick_dtype(name, torch.device(device)) is picked


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fp61", "dtype: unknown dtype 'fp61'; did you mean 'fp16'?"),
        ("float8", "dtype: unknown dtype 'float8'"),
        ("fp16", "dtype: fp16 is not supported on a CPU; use bf16 or fp32"),
    ],
)
def test_dtypes_that_do_not_go(name, told):
    with pytest.raises(ConfigError) as caught:
        pick_dtype(name, torch.device("cpu"))
    assert told in str(caught.value)


@pytest.mark.parametrize("bf16", [True, False])
def test_fast_bf16(bf16, machine, monkeypatch):
    machine(cuda=True, bf16=bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    assert fast_bf16(torch.device("cuda")) is bf16
    assert fast_bf16(torch.device("cpu")) is bf16
    assert fast_bf16(torch.device("mps")) is False


@pytest.mark.parametrize(
    ("precision", "device", "half"),
    [
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cuda:1", torch.float16),  # which gets a gradient scaler
        ("auto", "mps", None),
        ("fp32", "cuda", None),
        ("fp16", "cuda", torch.float16),
        ("bf16", "cuda:1", torch.bfloat16),
    ],
)
def test_the_precision_of_a_training(precision, device, half, machine):
    machine(cuda=True)
    assert half_dtype(precision, torch.device(device)) is half


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB, max allowed: 18.13 GB)"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported asynchronously"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_it):
    assert is_out_of_memory(error) is is_it


def test_memory_that_the_allocator_keeps_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 << 30)
    assert free_memory(torch.device("cuda")) == 18 << 30


def test_the_limit_of_a_container_is_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.device.CGROUP", tmp_path)
    whole = free_memory(torch.device("cpu"))
    for name, text in (
        ("memory.max", "9000"),
        ("memory.current", "8000"),
        ("memory.stat", "anon 5\ninactive_file 500\n"),
    ):
        (tmp_path / name).write_text(text)
    assert free_memory(torch.device("cpu")) == 1500 < whole  # what the kernel keeps of files it can give back
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(torch.device("cpu")) > 1500


FAULTS = """
import resource, sys
from ldm.device import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def some():
    return [b"x" * (20 << 20) for _ in range(3)]
some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    some()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_that_is_kept_is_not_asked_for_again():
    def faults(how):
        return int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)

    assert faults("keep") < 0.1 * faults("leave")


SPELLINGS = {
    "fp32": ("fp32", "float32", "torch.float32", torch.float32, "FP32", "float"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16", torch.bfloat16),
    "fp16": ("fp16", "float16", "half", "torch.float16", torch.float16, torch.half),
    "auto": ("auto",),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_a_dtype_is_taken(name):
    assert [check_dtype(spelling) for spelling in SPELLINGS[name]] == [name] * len(SPELLINGS[name])


def test_names_of_dtypes():
    assert [dtype_name(t) for t in (torch.float32, torch.half, torch.bfloat16)] == ["fp32", "fp16", "bf16"]
    assert dtype_name(torch.float64) == "torch.float64"


def test_the_collector_is_off_inside_and_then_as_it_was():
    with pytest.raises(ValueError), without_collector():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_model_is_loaded_without_the_collector(tiny_folder, monkeypatch):
    from ldm.checkpoint import load_model, model

    seen, load = [], model._load
    monkeypatch.setattr(model, "_load", lambda *args: seen.append(gc.isenabled()) or load(*args))
    monkeypatch.setattr(model, "_cache", type(model._cache)())
    load_model(tiny_folder, "cpu", "fp32")
    assert seen == [False] and gc.isenabled()
