"""Noise that a thread draws while a GPU works."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from ldm.training.loop.seeded import normal


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
