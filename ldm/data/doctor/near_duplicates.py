"""Which pictures look the same though their files differ, found without comparing each with each."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.console import progress
from ldm.data.doctor.image_info import SMALL, Look
from ldm.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

BITS = 3  # of 64 in which the fingerprints of pictures called alike may differ
SHARE = 0.1  # of a picture's own deviation, by which those called alike may differ at SMALL
ASPECT = 0.05  # by which the logarithms of their aspects may differ
BANDS = (13, 13, 13, 13, 12)  # bits; of five bands three differing bits leave two untouched
MOST = 512  # pictures of one band and brightness with which one is compared; see `alike`
CHUNK = 20_000  # pictures at once


class ThumbnailFile:
    """The pictures at SMALL x SMALL, in a file that is gone afterwards: 768 bytes each, none of them in memory.

    Raises ResourceError where the disk for such files is full.
    """

    def __init__(self) -> None:
        self._count = 0

    def __enter__(self) -> ThumbnailFile:
        with _disk():
            self._file = tempfile.TemporaryFile(prefix="ldm-doctor-")
        return self

    def __exit__(self, *_exc) -> None:
        with contextlib.suppress(OSError):  # what was not written yet
            self._file.close()

    def append(self, small: bytes) -> None:
        with _disk():
            self._file.write(small)
        self._count += 1

    def array(self) -> np.ndarray:
        """uint8 (pictures, 3 SMALL²), read from the file where it is looked at."""
        import numpy as np

        with _disk():
            self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self._count, 3 * SMALL * SMALL))


def _disk() -> AbstractContextManager:
    return disk_errors(Path(tempfile.gettempdir()))


def alike(looks: Sequence[Look], smalls: ThumbnailFile) -> tuple[list[list[str]], int]:
    """Groups of pictures that look the same though their files differ: each is like the first of its group.

    Of equal files one is compared, and blank pictures are not. Fingerprints that differ in at most BITS bits agree in
    two bands at least, and pictures that differ by little in brightness too: with those alone a picture is compared
    (Manku, Jain and Das Sarma 2007), which finds every pair. The number that is returned counts pictures that have so
    many of these that only the MOST nearest in brightness were compared.
    """
    import numpy as np

    first = {one.digest: i for i, one in reversed(list(enumerate(looks))) if not one.blank}
    rows = np.array(sorted(first.values()), np.int64)
    if len(rows) < 2:
        return [], 0
    prints = np.array([looks[i].fingerprint for i in rows], np.uint64)
    aspects = np.log([looks[i].size.width / looks[i].size.height for i in rows])
    values = smalls.array()
    mean, spread = _brightness(values, rows)
    tables = [_Table(prints & mask, mean, SHARE * spread) for mask in _masks()]
    crowded = np.any([table.ends - table.begins > 1 for table in tables], axis=0)
    groups, taken = [], np.zeros(len(rows), bool)
    for i in progress(np.flatnonzero(crowded), desc="near duplicates", unit="picture"):
        if taken[i]:
            continue
        near = np.unique(np.concatenate([table.near(i) for table in tables]))
        near = near[(near > i) & ~taken[near]]
        near = near[np.bitwise_count(prints[near] ^ prints[i]) <= BITS]
        close = (np.abs(aspects[near] - aspects[i]) < ASPECT) & (np.abs(spread[near] - spread[i]) <= SHARE * spread[i])
        same = _equal(values, rows, i, near[close], SHARE * spread[i])
        taken[same] = True
        groups += [[looks[rows[j]].id for j in (i, *same)]] if same else []
    return groups, int(np.any([table.cut for table in tables], axis=0).sum())


def _masks() -> Iterator[np.uint64]:
    """Each choice of two bands, as the bits of a fingerprint."""
    import numpy as np

    ends = list(itertools.accumulate(BANDS))
    bands = [(1 << end) - (1 << (end - size)) for end, size in zip(ends, BANDS)]
    yield from (np.uint64(one | other) for one, other in itertools.combinations(bands, 2))


class _Table:
    """Pictures by one choice of bands, then by brightness: those that one is compared with stand in one piece."""

    def __init__(self, keys: np.ndarray, mean: np.ndarray, reach: np.ndarray):
        import numpy as np

        order = np.lexsort((mean, keys))
        run = np.cumsum(np.r_[0, keys[order][1:] != keys[order][:-1]])
        line = run * 1024.0 + mean[order]  # increases; a step of 1024 from one key to the next, brightness has 256
        reach = reach[order] + 1e-4
        begins, ends = np.searchsorted(line, line - reach, "left"), np.searchsorted(line, line + reach, "right")
        cut, place = ends - begins > MOST, np.arange(len(order))
        self.order = order.astype(np.int32)
        self.begins = _back(order, np.where(cut, np.maximum(begins, place - MOST // 2), begins).astype(np.int32))
        self.ends = _back(order, np.where(cut, np.minimum(ends, place + MOST // 2), ends).astype(np.int32))
        self.cut = _back(order, cut)

    def near(self, i: int) -> np.ndarray:
        return self.order[self.begins[i] : self.ends[i]]


def _back(order: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values in this order, in the order of the pictures again."""
    import numpy as np

    result = np.empty_like(values)
    result[order] = values
    return result


def _brightness(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each of these pictures over places and colours, in levels."""
    import numpy as np

    mean, spread = np.empty(len(rows)), np.empty(len(rows))
    for begin in range(0, len(rows), CHUNK):
        part, here = values[rows[begin : begin + CHUNK]].astype(np.float32), slice(begin, begin + CHUNK)
        mean[here], spread[here] = part.mean(axis=1), part.std(axis=1)
    return mean, spread


def _equal(values: np.ndarray, rows: np.ndarray, one: int, others: np.ndarray, limit: float) -> list[int]:
    """Those whose difference from one, as the root of its mean square, is at most the limit."""
    import numpy as np

    found, own = [], values[rows[one]].astype(np.float32)
    for begin in range(0, len(others), CHUNK):
        part = others[begin : begin + CHUNK]
        difference = values[rows[part]].astype(np.float32) - own
        found += part[np.sqrt((difference**2).mean(axis=1)) <= limit].tolist()
    return found
