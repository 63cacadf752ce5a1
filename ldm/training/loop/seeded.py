"""Randomness that needs no state: every draw has its own generator, keyed by (seed, purpose, step, …)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor

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


class Ahead:
    """Normal draws, the next of which a thread makes while a GPU works; they are what `normal` returns."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "noise")
        self._coming: dict[tuple, Future[Tensor]] = {}

    def normal(self, shape: tuple[int, ...], parts: tuple, following: tuple) -> Tensor:
        """`normal(shape, *parts)`; expects to be asked for `following`, of the same shape, the next time."""
        made = self._coming.pop((shape, parts), None)
        self._coming = {(shape, following): self._thread.submit(normal, shape, *following)}
        return normal(shape, *parts) if made is None else made.result()


AHEAD: defaultdict[str, Ahead] = defaultdict(Ahead)  # the noise of the next batch, by the kind of batches
