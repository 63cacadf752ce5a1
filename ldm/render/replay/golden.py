"""The golden set: 24 images of the shipped model, whose pixels are kept as hashes for each kind of CPU and torch.

They show whether a release draws as the one before. `ldm verify --golden` compares; tests/make_golden.py writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import resources
from typing import Any

import torch

from ldm.errors import ConfigError

FILE = "golden.json"
THREADS = 1  # hashes are of one thread: its sums have one order
COMMON: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 4.0, "width": 128, "height": 128}
# name -> (prompt, what differs from COMMON)
SET: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        sampler: ("a cat on a blue background", {"sampler": sampler})
        for sampler in ("euler", "heun_flow", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "ddim")
    },
    "eta": ("a red car", {"sampler": "ddim", "eta": 0.5}),
    "default sampler": ("a red car", {}),
    "one step": ("a tree", {"num_inference_steps": 1}),
    "nine steps": ("a tree", {"num_inference_steps": 9}),
    "no guidance": ("a dog", {"guidance_scale": 1.0}),
    "high guidance": ("a dog", {"guidance_scale": 12.0}),
    "rescale": ("a dog", {"guidance_rescale": 0.7}),
    "interval": ("a dog", {"guidance_interval": (0.25, 0.75)}),
    "apg": ("a dog", {"guidance": "apg"}),
    "pag": ("a dog", {"guidance": "pag"}),
    "cfg zero": ("a dog", {"guidance": "cfg_zero"}),
    "wide": ("a house", {"width": 192}),
    "small": ("a house", {"width": 64, "height": 64}),
    "emphasis": ("a (red:1.4) house", {}),
    "editing": ("a [cat:dog:0.5]", {}),
    "alternation": ("a [cat|dog]", {}),
    "emoji": ("a 🍕", {}),
    "variation": ("a pizza", {"variation_seed": 5, "variation_strength": 0.3}),
}


def kind() -> str:
    """The kind of CPU and torch that bits depend on: "AuthenticAMD AVX2, torch 2.13"."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return f"{_vendor()} {torch.backends.cpu.get_cpu_capability()}, torch {version}"


def _vendor() -> str:
    import platform

    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "cpu")
    except OSError:
        return platform.machine() or "cpu"


@cache
def hashes() -> dict[str, dict[str, str]]:
    """Kind -> name in SET -> sha256 of the pixels, as this release draws them."""
    return json.loads(resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8"))["hashes"]


def draw(names: Iterable[str] = SET) -> Iterator[tuple[str, str]]:
    """(name, sha256 of the pixels) of images of the set, drawn one by one by the shipped model in fp32 on the CPU."""
    from ldm.pipeline import Pipeline

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for name in names:
            prompt, settings = SET[name]
            pipe = Pipeline(prompt, device="cpu", dtype="fp32")
            (image,) = pipe.generate(seed=24, **{**COMMON, **settings})
            yield name, hashlib.sha256(image.tobytes()).hexdigest()
    finally:
        torch.set_num_threads(before)


def compare(names: Iterable[str] = SET) -> tuple[list[str], list[str]]:
    """(names that are drawn as this release does, names that are not). Raises ConfigError where no hashes are kept."""
    names = list(names)
    known = hashes().get(kind())
    if known is None:
        listed = "; ".join(hashes()) or "none"
        raise ConfigError(f"no hashes are kept for {kind()}", where="golden set", hint=f"there are those of: {listed}")
    same = [name for name, digest in draw(names) if known.get(name) == digest]
    return same, [name for name in names if name not in same]
