"""What one pass over the pictures of a set finds out, and which of them are the same file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.data.buckets import Size
from ldm.data.images import read_header, read_picture
from ldm.data.sources import Sample

if TYPE_CHECKING:
    from PIL import Image

SMALL = 16  # pixels; pictures are compared at this size
BLANK = 10  # levels from the darkest to the brightest, below which there is nothing to be seen


@dataclass(frozen=True, slots=True)
class Look:
    """One picture as the doctor saw it."""

    id: str
    size: Size  # upright
    digest: bytes  # of the file
    fingerprint: int  # 64 bits: whether each of 8x8 places is brighter than its right neighbour (Krawetz, dHash)
    turned: bool  # by EXIF
    animated: bool
    transparent: bool
    blank: bool


def look(sample: Sample) -> tuple[Look, bytes]:
    """Read a picture once; with it its RGB values at SMALL x SMALL. Raises PictureError where that cannot be done."""
    from PIL import Image

    with sample.open() as file:
        header = read_header(file, sample.where)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        picture = read_picture(file, sample.where, at_least=8 * SMALL)
    small = picture.resize((SMALL, SMALL), Image.Resampling.BOX)
    seen = Look(
        sample.id,
        Size(header.height, header.width),
        digest,
        fingerprint(picture),
        header.orientation != 1,
        header.animated,
        header.transparent,
        max(high - low for low, high in picture.getextrema()) < BLANK,
    )
    return seen, small.tobytes()


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
