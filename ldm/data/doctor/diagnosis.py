"""What the doctor of data found: single findings, and all of them as text or JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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


@dataclass(frozen=True)
class Finding:
    """One finding: a fault where it has a `hint` how to mend it, else a note."""

    kind: str
    count: int  # images
    what: str
    hint: str | None = None
    groups: list[list[str]] = field(default_factory=list)  # ids of images; those that belong together share a list


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the doctor found in a set."""

    path: str
    layout: str
    resolution: int  # pixels, of the buckets
    found: int
    used: int
    skipped: dict[str, int]  # reason -> things left out
    captions: int
    words: dict[int, int]  # words of a caption -> captions
    sides: tuple[int, int, int]  # pixels of the shorter side: least, middle, most
    buckets: list[Share]
    epoch: int  # samples, repeats counted
    lines: list[str]  # the summary as text
    findings: list[Finding]
    estimate: list[str]  # steps, time and memory of a training on this machine; [] if not requested

    @property
    def sound(self) -> bool:
        return not any(finding.hint for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        shares = [{**dataclasses.asdict(s), "bucket": [s.bucket.width, s.bucket.height]} for s in self.buckets]
        return {**dataclasses.asdict(self), "buckets": shares, "sound": self.sound}

    def as_text(self) -> str:
        lines = list(self.lines)
        cropped = sum(share.lost * share.images for share in self.buckets) / max(1, self.used)
        least, middle, most = self.sides
        lines.append(f"shorter sides {least} to {most} px, half of them at least {middle} px")
        listed = ", ".join(f"{s.bucket.width}x{s.bucket.height} {s.images}" for s in self.buckets[:6])
        more = f", and {len(self.buckets) - 6} more" if len(self.buckets) > 6 else ""
        cropped_share = f"{100 * cropped:.1f} % of the pixels are cropped away"
        lines.append(f"buckets at {self.resolution}: {listed}{more}; {cropped_share}")
        lines += [] if self.estimate else [f"an epoch has {self.epoch} samples"]
        lines += [f"{'  ' if i else 'a training here: '}{line}" for i, line in enumerate(self.estimate)]
        for finding in sorted(self.findings, key=lambda f: f.hint is None):
            lines.append(f"{'mend' if finding.hint else 'note'}: {finding.what}")
            lines += [f"      {finding.hint}"] if finding.hint else []
        return "\n".join(lines)
