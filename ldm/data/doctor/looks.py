"""What one pass over the pictures of a set finds out, and which of them are the same picture."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.data.buckets import Size
from ldm.data.pictures import read_header, read_picture
from ldm.data.sources import Sample

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SMALL = 16  # pixels; pictures are compared at this size
BITS = 3  # of 64 in which the fingerprints of pictures called alike may differ
MEAN, MOST = 1.5, 32  # levels of 255 by which these may differ at SMALL: on average, and in one place
NEAR_LIMIT = 50_000  # pictures up to which each is compared with each
BLANK = 2.0  # levels of standard deviation at SMALL, below which there is nothing to be seen
PAIRS = 20_000  # compared at once


@dataclass(frozen=True, slots=True)
class Look:
    """One picture as the doctor saw it."""

    id: str
    size: Size  # upright
    digest: bytes  # of the file
    fingerprint: int  # 64 bits: whether each of 8x8 places is brighter than its right neighbour (Krawetz, dHash)
    small: bytes  # RGB at SMALL x SMALL
    turned: bool  # by EXIF
    animated: bool
    transparent: bool
    blank: bool


def look(sample: Sample) -> Look:
    """Read a picture once. Raises PictureError where that cannot be done."""
    import numpy as np
    from PIL import Image

    with sample.open() as file:
        header = read_header(file, sample.where)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        picture = read_picture(file, sample.where, at_least=8 * SMALL)
    small = picture.resize((SMALL, SMALL), Image.Resampling.BOX)
    return Look(
        sample.id,
        Size(header.height, header.width),
        digest,
        fingerprint(picture),
        small.tobytes(),
        header.orientation != 1,
        header.animated,
        header.transparent,
        bool(np.asarray(small).std(axis=(0, 1)).max() < BLANK),
    )


def fingerprint(picture: Image.Image) -> int:
    """The difference hash of a picture, the same for copies of another size or quality."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def same_files(looks: Sequence[Look]) -> list[list[str]]:
    """Groups of pictures whose files are equal byte for byte."""
    groups = defaultdict(list)
    for one in looks:
        groups[one.digest].append(one.id)
    return [group for group in groups.values() if len(group) > 1]


def alike(looks: Sequence[Look]) -> list[list[str]]:
    """Groups of pictures that look the same though their files differ: each is like at least one other of its group.

    Of equal files one is compared, and blank pictures are not. [] for more than NEAR_LIMIT of them.
    """
    import numpy as np

    different = list({one.digest: one for one in reversed(looks) if not one.blank}.values())[::-1]
    if not 1 < len(different) <= NEAR_LIMIT:
        return []
    prints = np.array([one.fingerprint for one in different], np.uint64)
    smalls = np.stack([np.frombuffer(one.small, np.uint8) for one in different])
    aspects = np.array([one.size.width / one.size.height for one in different])
    parent = list(range(len(different)))
    for i in range(len(different)):
        near = i + 1 + np.flatnonzero(np.bitwise_count(prints[i + 1 :] ^ prints[i]) <= BITS)
        near = near[np.abs(np.log(aspects[near] / aspects[i])) < 0.05]
        for begin in range(0, len(near), PAIRS):
            for j in _equal(smalls, i, near[begin : begin + PAIRS]):
                parent[_root(parent, j)] = _root(parent, i)
    groups = defaultdict(list)
    for i, one in enumerate(different):
        groups[_root(parent, i)].append(one.id)
    return [group for group in groups.values() if len(group) > 1]


def _equal(smalls: np.ndarray, one: int, others: np.ndarray) -> list[int]:
    import numpy as np

    difference = np.abs(smalls[others].astype(np.int16) - smalls[one])
    return others[(difference.mean(axis=1) <= MEAN) & (difference.max(axis=1) <= MOST)].tolist()


def _root(parent: list[int], i: int) -> int:
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i
