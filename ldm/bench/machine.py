"""What a bug report needs to know of a machine and an installation: `ldm doctor`. Nothing is changed or written."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

import ldm
from ldm import device as devices
from ldm.checkpoint.folder import default_folder
from ldm.data.emoji.sprites import find_font
from ldm.errors import LdmError, first_line
from ldm.files import format_bytes
from ldm.nn.attention import BACKENDS, attention, check_backend

PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "pillow")
PACKAGES += ("numpy", "huggingface_hub")
EXTRAS = {  # module -> what it is for, and the extra that installs it
    "bitsandbytes": ("8-bit optimizers", "bitsandbytes"),
    "open_clip": ("Open CLIP's text encoders", "open-clip"),
    "ray": ("ldm render --ray", "ray"),
    "tensorboard": ("--report-to tensorboard", "trackers"),
    "wandb": ("--report-to wandb", "trackers"),
    "torchao": ("--quantization int8", "int8"),
    "xformers": ("--attention xformers", "xformers"),
}
FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "sve")
HUB_SECONDS = 3.0
LABELS = {"cpu": "CPU", "memory": "memory", "gpu": "GPU", "torch": "torch", "auto": "auto picks"}


def doctor(offline: bool = False, paths: bool = False) -> dict[str, Any]:
    """Facts about this machine, as JSON.

    offline  do not ask whether the hub answers (else it is asked for 3 seconds at most)
    paths    show folders too: they may hold personal names

    `missing` lists what drawing needs and is not there, each with what to do.
    """
    missing: list[str] = []
    found: dict[str, Any] = {
        "ldm": ldm.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "memory": _memory(),
        "gpu": _gpu(),
        "torch": _torch(),
        "auto": _auto(),
        "attention": {name: _attention(name) for name in BACKENDS},
        "packages": {name: _version(name) for name in PACKAGES},
        "extras": {name: _extra(name) for name in EXTRAS},
        "model": _model(missing),
        "font": _font(),
        "disk": _disk(),
        "hub": "not asked (--offline)" if offline or _offline_by_environment() else _hub(),
    }
    missing += [
        f"{name} is not installed: pip install {name}" for name, one in found["packages"].items() if one is None
    ]
    found["missing"] = missing
    if paths:
        found["paths"] = _paths()
    return found


def as_text(found: dict[str, Any]) -> str:
    """One page."""
    lines = []
    for name, value in found.items():
        if name == "missing":
            continue
        label = LABELS.get(name, name)
        if isinstance(value, dict):
            parts = [f"{key} {_shown(item)}" for key, item in value.items() if item not in (None, "", [])]
            absent = [key for key, item in value.items() if item is None]
            parts += [f"absent: {', '.join(absent)}"] if absent else []
            value = "\n".join(parts) if name in ("extras", "attention", "paths") else ", ".join(parts)
        indented = str(_shown(value)).replace("\n", "\n" + " " * 12)
        lines.append(f"{label:11} {indented}")
    lines += [f"missing     {line}" for line in found["missing"]]
    return "\n".join(lines)


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else value


def _cpu() -> dict[str, Any]:
    read = _proc("/proc/cpuinfo", ":")
    present = (read.get("flags") or read.get("Features") or "").split()
    return {
        "name": _cpu_name(read),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in present],
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_name(read: Mapping[str, str]) -> str:
    """With family and model where these are told: clouds shorten the name."""
    name = read.get("model name") or platform.processor() or platform.machine()
    kind = [f"{word} {read[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in read]
    return f"{name} ({', '.join(kind)})" if kind else name


def facts() -> dict[str, Any]:
    """What a measurement depends on: when, on what, with which packages, by which command."""
    packages = {name: _version(name) for name in ("torch", "diffusers", "transformers", "peft")}
    found = {"date": datetime.now().astimezone().isoformat(timespec="seconds"), "ldm": ldm.__version__, "cpu": _cpu()}
    found |= {"gpu": _gpu(), "memory": _memory()["total"], "threads": torch.get_num_threads(), "packages": packages}
    return {**found, "system": platform.system(), "command": " ".join(["ldm", *sys.argv[1:]])}


def facts_line(found: Mapping[str, Any]) -> str:
    """The facts as one line."""
    cpu, packages = found["cpu"], [f"{name} {version}" for name, version in found["packages"].items() if version]
    parts = [
        f"{cpu['name']}, {cpu['usable']} of {cpu['cores']} cores ({' '.join(cpu['flags'])})",
        f"threads {found['threads']}",
    ]
    gpu = found["gpu"] if isinstance(found["gpu"], list) else []
    return ", ".join([*parts, f"memory {found['memory']}", *gpu, *packages, found["date"][:10]])


def _proc(path: str, mark: str) -> dict[str, str]:
    """The first of each name in a file of the kernel; {} where there is none."""
    facts: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, _, value = line.partition(mark)
                facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    return facts


def _memory() -> dict[str, str]:
    total = _proc("/proc/meminfo", ":").get("MemTotal", "0 kB").split()[0]
    return {"total": format_bytes(int(total) * 1024), "free": format_bytes(devices.free_memory(torch.device("cpu")))}


def _gpu() -> list[str] | str:
    if torch.cuda.is_available():
        kinds = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{one.name} ({format_bytes(one.total_memory)}, compute {one.major}.{one.minor})" for one in kinds]
    return "MPS" if torch.backends.mps.is_available() else "none"


def _torch() -> dict[str, Any]:
    return {
        "version": torch.__version__,
        "CUDA": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "oneDNN": torch.backends.mkldnn.is_available(),
        "MKL": torch.backends.mkl.is_available(),
    }


def _auto() -> dict[str, Any]:
    device = devices.pick_device("auto")
    dtype = devices.dtype_name(devices.pick_dtype("auto", device))
    return {"device": str(device), "dtype": dtype, "fast bf16": devices.fast_bf16(device)}


def _attention(name: str) -> str:
    """Whether a backend works here: tried on a few numbers."""
    device = devices.pick_device("auto")
    try:
        check_backend(name, device)
        q = torch.linspace(-1, 1, 2 * 8 * 16, device=device).view(2, 8, 16)
        with torch.no_grad():
            works = torch.allclose(attention(q, q, q, 2, backend=name), attention(q, q, q, 2), atol=1e-4)
        return "works" if works else "gives other numbers"
    except (LdmError, RuntimeError) as error:
        return f"does not work ({first_line(error)})"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _extra(module: str) -> str:
    use, extra = EXTRAS[module]
    if util.find_spec(module) is not None:
        return "installed"
    return f"not installed: for {use}, pip install 'ldm-pipeline[{extra}]'"


def _model(missing: list[str]) -> str:
    try:
        default_folder()
        return "the shipped model is there"
    except LdmError as error:
        missing.append(f"{error.what}; {error.hint}")
        return error.what


def _font() -> str:
    """For `ldm data emoji`, `ldm evaluate` and training on emoji alone."""
    try:
        return f"{find_font().name} is there"
    except LdmError as error:
        return f"{error.what}; {error.hint}" if error.hint else error.what


def _disk() -> dict[str, str]:
    places = {"here": Path(), "temporary": Path(os.environ.get("TMPDIR", "/tmp")), "cache": _cache()}
    found = {}
    for name, place in places.items():
        probe = place.absolute()
        while not probe.exists():
            probe = probe.parent
        found[name] = f"{format_bytes(shutil.disk_usage(probe).free)} free"
    return found


def _cache() -> Path:
    return Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))


def _offline_by_environment() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _hub() -> str:
    """Whether a connection to the hub can be opened; asked in a thread, since looking up a name has no limit."""
    import socket
    import threading
    from urllib.parse import urlsplit

    parts = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = parts.hostname or "huggingface.co", parts.port or (80 if parts.scheme == "http" else 443)
    answer = [f"{host} does not answer within {HUB_SECONDS:g} s"]

    def ask() -> None:
        try:
            with socket.create_connection((host, port), timeout=HUB_SECONDS):
                answer[0] = f"{host} answers"
        except OSError as error:
            answer[0] = f"{host} cannot be reached ({error.strerror or first_line(error)})"

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answer[0]


def _paths() -> dict[str, str]:
    return {
        "python": sys.executable,
        "package": str(Path(ldm.__file__).parent),
        "cache": str(_cache()),
        "here": str(Path().absolute()),
    }
