"""What the doctor records of each image, and which images are the same file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.data.buckets import Size
from ldm.data.images import read_header, read_image
from ldm.data.sources import Sample

if TYPE_CHECKING:
    from PIL import Image

SMALL = 16  # pixels; images are compared at this size
BLANK = 10  # levels between the darkest and the brightest pixel, below which an image is blank


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image of a set."""

    id: str
    size: Size  # upright
    digest: bytes  # of the file
    fingerprint: int  # 64 bits: whether each of 8x8 places is brighter than its right neighbour (Krawetz, dHash)
    turned: bool  # by EXIF
    animated: bool
    transparent: bool
    blank: bool
    profile: str = ""  # name of the ICC profile from which its colours are converted


def read_image_info(sample: Sample) -> tuple[ImageInfo, bytes]:
    """Read an image once: its info, and its RGB values at SMALL x SMALL. Raises ImageError."""
    from PIL import Image

    with sample.open() as file:
        header = read_header(file, sample.where)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        image = read_image(file, sample.where, at_least=8 * SMALL)
    thumbnail = image.resize((SMALL, SMALL), Image.Resampling.BOX)
    info = ImageInfo(
        sample.id,
        Size(header.height, header.width),
        digest,
        fingerprint(image),
        header.orientation != 1,
        header.animated,
        header.transparent,
        max(high - low for low, high in image.getextrema()) < BLANK,
        header.profile,
    )
    return info, thumbnail.tobytes()


def fingerprint(image: Image.Image) -> int:
    """The difference hash of an image, the same for copies of another size or quality."""
    import numpy as np
    from PIL import Image

    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(int)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def same_files(infos: Sequence[ImageInfo]) -> list[list[str]]:
    """Groups of images whose files are equal byte for byte."""
    groups = defaultdict(list)
    for info in infos:
        groups[info.digest].append(info.id)
    return [group for group in groups.values() if len(group) > 1]
