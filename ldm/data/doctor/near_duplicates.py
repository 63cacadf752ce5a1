"""Which images look the same though their files differ: by a hash of 64 bits first, then by their pixels."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.console import progress
from ldm.data.doctor.image_info import SMALL, ImageInfo
from ldm.files import disk_errors

if TYPE_CHECKING:
    import numpy as np

BITS = 3  # of 64 by which the fingerprints of near duplicates may differ
SHARE = 0.1  # of an image's own deviation, by which its near duplicates may differ at SMALL
ASPECT = 0.05  # by which the logarithms of their aspects may differ
MOST = 512  # images that one is compared with, pixel by pixel
CHUNK = 20_000  # images at once


class ThumbnailFile:
    """The images at SMALL x SMALL in a temporary file: 768 bytes each, none of them in memory.

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

    def append(self, thumbnail: bytes) -> None:
        with _disk():
            self._file.write(thumbnail)
        self._count += 1

    def array(self) -> np.ndarray:
        """uint8 (images, 3 SMALL²), read from the file where it is looked at."""
        import numpy as np

        with _disk():
            self._file.flush()
        return np.memmap(self._file, np.uint8, "r", shape=(self._count, 3 * SMALL * SMALL))


def _disk() -> AbstractContextManager:
    return disk_errors(Path(tempfile.gettempdir()))


def near_duplicates(infos: Sequence[ImageInfo], thumbnails: ThumbnailFile) -> tuple[list[list[str]], int]:
    """(groups, crowded): ids of images that look the same though their files differ, each like the first of its group.

    Equal files count once, and blank images not at all. Each fingerprint is compared with all that follow: a second for
    20,000 images, and ten minutes for a million, whose reading takes hours. `crowded` counts images with more than MOST
    candidates: they are compared with the MOST of them that are nearest in brightness.
    """
    import numpy as np

    first = {info.digest: i for i, info in reversed(list(enumerate(infos))) if not info.blank}
    rows = np.array(sorted(first.values()), np.int64)
    if len(rows) < 2:
        return [], 0
    prints = np.array([infos[i].fingerprint for i in rows], np.uint64)
    aspects = np.log([infos[i].size.width / infos[i].size.height for i in rows])
    values = thumbnails.array()
    mean, deviation = _brightness(values, rows)
    groups, crowded, grouped = [], 0, np.zeros(len(rows), bool)
    for i in progress(range(len(rows)), desc="near duplicates", unit="image"):
        if grouped[i]:
            continue
        limit = SHARE * deviation[i]
        close = i + 1 + np.flatnonzero(np.bitwise_count(prints[i + 1 :] ^ prints[i]) <= BITS)
        gap = np.abs(mean[close] - mean[i])  # of the brightness: never above the RMS difference of the pixels
        fits = ~grouped[close] & (gap <= limit + 1e-4) & (np.abs(deviation[close] - deviation[i]) <= limit)
        fits &= np.abs(aspects[close] - aspects[i]) < ASPECT
        close = close[fits]
        if len(close) > MOST:
            crowded += 1
            close = np.sort(close[np.argpartition(gap[fits], MOST)[:MOST]])
        same = _equal(values, rows, i, close, limit)
        grouped[same] = True
        groups += [[infos[rows[j]].id for j in (i, *same)]] if same else []
    return groups, crowded


def _brightness(values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each of these images over places and colours, in levels."""
    import numpy as np

    mean, deviation = np.empty(len(rows)), np.empty(len(rows))
    for begin in range(0, len(rows), CHUNK):
        part, here = values[rows[begin : begin + CHUNK]].astype(np.float32), slice(begin, begin + CHUNK)
        mean[here], deviation[here] = part.mean(axis=1), part.std(axis=1)
    return mean, deviation


def _equal(values: np.ndarray, rows: np.ndarray, image: int, candidates: np.ndarray, limit: float) -> list[int]:
    """The candidates whose RMS difference from the image is at most the limit."""
    import numpy as np

    difference = values[rows[candidates]].astype(np.float32) - values[rows[image]].astype(np.float32)
    return candidates[np.sqrt((difference**2).mean(axis=1)) <= limit].tolist()
