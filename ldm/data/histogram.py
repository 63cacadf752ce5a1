"""How many images of a dataset each bucket gets, and what cropping costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ldm.data.buckets import BucketConfig, Size, bucket_of, resized


@dataclass(frozen=True)
class Share:
    """One line of the histogram: a bucket and the images in it."""

    bucket: Size
    images: int
    lost: float  # share of the pixels that is cropped away, 0 to 1, mean over the images
    enlarged: int  # images that are smaller than the bucket on a side


def histogram(sizes: Iterable[Size], config: BucketConfig) -> list[Share]:
    """The buckets of images of these sizes, the fullest first. The counts add up to the number of images."""
    groups: dict[Size, Counter[Size]] = {}
    for size, count in Counter(sizes).items():
        groups.setdefault(bucket_of(size, config), Counter())[size] = count
    shares = []
    for bucket, members in groups.items():
        lost = sum(count * (1 - bucket.area / resized(size, bucket).area) for size, count in members.items())
        enlarged = sum(n for size, n in members.items() if size.height < bucket.height or size.width < bucket.width)
        shares.append(Share(bucket, members.total(), lost / members.total(), enlarged))
    return sorted(shares, key=lambda share: (-share.images, share.bucket))
