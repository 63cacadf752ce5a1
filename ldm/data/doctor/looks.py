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
SHARE = 0.1  # of a picture's own deviation, by which those called alike may differ at SMALL
NEAR_LIMIT = 50_000  # pictures up to which each is compared with each
BLANK = 10  # levels from the darkest to the brightest, below which there is nothing to be seen
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
        max(high - low for low, high in picture.getextrema()) < BLANK,
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
    """Groups of pictures that look the same though their files differ: each is like the first of its group.

    Of equal files one is compared, and blank pictures are not. [] for more than NEAR_LIMIT of them.
    """
    import numpy as np

    different = list({one.digest: one for one in reversed(looks) if not one.blank}.values())[::-1]
    if not 1 < len(different) <= NEAR_LIMIT:
        return []
    prints = np.array([one.fingerprint for one in different], np.uint64)
    smalls = np.stack([np.frombuffer(one.small, np.uint8) for one in different])
    aspects = np.array([one.size.width / one.size.height for one in different])
    groups, taken = [], np.zeros(len(different), bool)
    for i in range(len(different)):
        if taken[i]:
            continue
        near = i + 1 + np.flatnonzero(np.bitwise_count(prints[i + 1 :] ^ prints[i]) <= BITS)
        near = near[(np.abs(np.log(aspects[near] / aspects[i])) < 0.05) & ~taken[near]]
        same = [j for begin in range(0, len(near), PAIRS) for j in _equal(smalls, i, near[begin : begin + PAIRS])]
        taken[same] = True
        groups += [[different[j].id for j in (i, *same)]] if same else []
    return groups


def _equal(smalls: np.ndarray, one: int, others: np.ndarray) -> list[int]:
    """Those whose difference from one, as the root of its mean square, is within SHARE of the deviation of that one."""
    import numpy as np

    difference = smalls[others].astype(np.float32) - smalls[one]
    return others[np.sqrt((difference**2).mean(axis=1)) <= SHARE * smalls[one].std()].tolist()
