"""Randomness that needs no state: every draw has its own generator, keyed by (seed, purpose, step, …)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """A 63-bit number from any printable parts, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator of its own for (seed, purpose, step, …): nothing has to be saved to resume it."""
    return torch.Generator("cpu").manual_seed(key(*parts))


def normal(shape: tuple[int, ...], *parts: object) -> Tensor:
    """Standard normal draws of `shape`, fp32, on the CPU."""
    return torch.randn(shape, generator=generator(*parts))


def uniform(shape: tuple[int, ...], *parts: object) -> Tensor:
    """Uniform draws in [0, 1) of `shape`, fp32, on the CPU."""
    return torch.rand(shape, generator=generator(*parts))


def integers(high: int, shape: tuple[int, ...], *parts: object) -> Tensor:
    """Integer draws in [0, high) of `shape`, on the CPU."""
    return torch.randint(high, shape, generator=generator(*parts))
