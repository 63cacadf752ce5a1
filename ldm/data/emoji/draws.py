"""Random choices that are a pure function of (seed, index), on every Python version."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices from Python's Mersenne Twister, through `random()` alone, whose values Python promises to keep."""

    def __init__(self, seed: int, index: int):
        key = hashlib.sha256(f"{seed}/{index}".encode()).digest()
        self.random = random.Random(int.from_bytes(key[:8], "big")).random

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.random() < p

    def integer(self, low: int, high: int) -> int:
        """A whole number of low..high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[int(self.random() * len(items))]

    def weighted(self, weights: Mapping[T, float]) -> T:
        """One of the keys, in proportion to its weight."""
        left = self.random() * sum(weights.values())
        for key, weight in weights.items():
            left -= weight
            if left < 0:
                return key
        return max(weights, key=weights.get)  # rounding left a rest
