"""Aspect buckets: sizes of about equal area, the nearest for each image, and batches of one size each."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ldm.config import require
from ldm.errors import DataError

if TYPE_CHECKING:
    import numpy as np


class Size(NamedTuple):
    """Pixels."""

    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class BucketConfig:
    """The set of buckets; min_side = max_side = resolution gives squares only. Raises ConfigError."""

    resolution: int = 512  # pixels; a bucket has at most resolution² of them
    step: int = 64  # pixels; every side is a multiple
    min_side: int | None = None  # pixels; None: resolution / 2
    max_side: int | None = None  # pixels; None: 2 * resolution
    upscale: bool = True  # False: an image smaller than its bucket gets a smaller bucket, even below min_side

    def __post_init__(self):
        require(self.step >= 1, f"must be at least 1, got {self.step}", "step")
        hint = f"use {max(self.step, self.resolution // self.step * self.step)}"
        fits = self.resolution >= self.step and self.resolution % self.step == 0
        require(fits, f"{self.resolution} is not a multiple of the step {self.step}; {hint}", "resolution")
        low, high = self.sides
        require(low >= self.step, f"must be at least the step {self.step}, got {low}", "min_side")
        require(low <= self.resolution, f"must be at most the resolution {self.resolution}, got {low}", "min_side")
        require(high >= self.resolution, f"must be at least the resolution {self.resolution}, got {high}", "max_side")

    @property
    def sides(self) -> tuple[int, int]:
        """The shortest and the longest side, multiples of the step."""
        low = max(self.step, self.resolution // 2) if self.min_side is None else self.min_side
        high = 2 * self.resolution if self.max_side is None else self.max_side
        return -(-low // self.step) * self.step, high // self.step * self.step


@functools.lru_cache
def buckets(config: BucketConfig) -> tuple[Size, ...]:
    """All buckets, from wide to tall: the square of the resolution, and the longest other side for every side.

    The areas are at most resolution², so that no batch needs more memory than one of squares (as in kohya's scripts).
    """
    low, high = config.sides
    sizes = {Size(config.resolution, config.resolution)}
    for side in range(low, high + 1, config.step):
        longest = min(config.resolution**2 // side // config.step * config.step, high)
        if longest >= low:
            sizes |= {Size(side, longest), Size(longest, side)}
    return tuple(sorted(sizes, key=lambda size: (size.height / size.width, size)))


@functools.lru_cache(maxsize=1 << 16)
def bucket_of(size: Size, config: BucketConfig) -> Size:
    """The bucket nearest in aspect, for which cropping loses the fewest pixels; of equal ones the largest.

    Without `upscale` an image that is smaller than it on either side gets its sides rounded down to the step.
    """

    def order(bucket: Size) -> tuple[float, int, Size]:
        sides = size.height * bucket.width, size.width * bucket.height
        return -min(sides) / max(sides), -bucket.area, bucket

    best = min(buckets(config), key=order)
    if config.upscale or (size.height >= best.height and size.width >= best.width):
        return best
    step, high = config.step, config.sides[1]
    height, width = (max(step, min(side // step * step, high)) for side in size)
    room = max(step, config.resolution**2 // min(height, width) // step * step)
    return Size(min(height, room), width) if height > width else Size(height, min(width, room))


def resized(size: Size, bucket: Size) -> Size:
    """The image's size after resizing to cover the bucket, its aspect kept."""
    if bucket.height * size.width >= bucket.width * size.height:  # height needs the larger factor
        return Size(bucket.height, max(bucket.width, _rounded(size.width * bucket.height, size.height)))
    return Size(max(bucket.height, _rounded(size.height * bucket.width, size.width)), bucket.width)


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def cropped(size: Size, config: BucketConfig) -> float:
    """The share of an image's pixels that its bucket loses, 0 to 1."""
    bucket = bucket_of(size, config)
    return 1 - bucket.area / resized(size, bucket).area


class Batches:
    """The order of training: batches of one bucket each, a pure function of (seed, epoch, buckets, batch size).

    Every position comes exactly once in an epoch: images are shuffled inside their bucket and cut into batches, and
    the batches are shuffled. The rest of a bucket becomes a smaller batch; it is never filled up or dropped, and its
    images change from epoch to epoch. To repeat an image, list its bucket at several positions.
    Raises DataError where there are no images.
    """

    def __init__(self, buckets: Sequence[Size], batch_size: int, seed: int):
        import numpy as np

        require(batch_size >= 1, f"must be at least 1, got {batch_size}", "batch_size")
        if not buckets:
            raise DataError("there are no images to make batches of")
        self.seed = seed
        _, self._bucket, counts = np.unique(np.asarray(buckets), axis=0, return_inverse=True, return_counts=True)
        self._bucket = self._bucket.reshape(-1)
        ends = np.cumsum(counts)
        starts = [range(end - count, end, batch_size) for end, count in zip(ends.tolist(), counts.tolist())]
        self._spans = [
            (start, min(start + batch_size, end)) for group, end in zip(starts, ends.tolist()) for start in group
        ]
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """The number of batches in an epoch, the same in each."""
        return len(self._spans)

    def at(self, step: int) -> tuple[int, list[int]]:
        """(epoch, positions) of batch `step`, counted from the beginning of the training."""
        epoch, number = divmod(step, len(self))
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._orders(epoch))
        _, order, batches = self._epoch
        begin, end = self._spans[batches[number]]
        return epoch, order[begin:end].tolist()

    def _orders(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions by bucket, shuffled in each, and the order of the batches."""
        import numpy as np

        images = shuffle_keys(len(self._bucket), self.seed, "pictures", epoch)
        batches = shuffle_keys(len(self), self.seed, "batches", epoch)
        return np.lexsort((images, self._bucket)), np.argsort(batches, kind="stable")


def shuffle_keys(count: int, *parts: object) -> np.ndarray:
    """uint64 (count,) whose sorting order is random, seeded by `parts`, and equal on every machine.

    SplitMix64 (Steele, Lea and Flood 2014) from a hash of the parts on.
    """
    import numpy as np

    start = int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
    z = np.uint64(start) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
