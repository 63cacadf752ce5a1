"""What the doctor of data found: single findings, and all of them as text or JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ldm.data.buckets import Share


@dataclass(frozen=True)
class Finding:
    """Something about the data; with `todo` it should be mended, without it is only told."""

    kind: str
    count: int  # pictures
    what: str
    todo: str | None = None
    groups: list[list[str]] = field(default_factory=list)  # ids of the pictures, those that belong together in one list


@dataclass(frozen=True)
class Diagnosis:
    """All that the doctor found out about a set."""

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
    lines: list[str]  # for people
    findings: list[Finding]
    estimate: list[str]  # of the steps, time and memory of a training here; [] where none was asked for

    @property
    def sound(self) -> bool:
        return not any(finding.todo for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        shares = [{**dataclasses.asdict(s), "bucket": [s.bucket.width, s.bucket.height]} for s in self.buckets]
        return {**dataclasses.asdict(self), "buckets": shares, "sound": self.sound}

    def as_text(self) -> str:
        said = list(self.lines)
        lost = sum(share.lost * share.pictures for share in self.buckets) / max(1, self.used)
        least, middle, most = self.sides
        said.append(f"shorter sides {least} to {most} px, half of them at least {middle} px")
        listed = ", ".join(f"{s.bucket.width}x{s.bucket.height} {s.pictures}" for s in self.buckets[:6])
        more = f", and {len(self.buckets) - 6} more" if len(self.buckets) > 6 else ""
        said.append(f"buckets at {self.resolution}: {listed}{more}; {100 * lost:.1f} % of the pixels are cropped away")
        said.append(f"an epoch has {self.epoch} samples")
        said += [f"{'  ' if i else 'a training here: '}{line}" for i, line in enumerate(self.estimate)]
        for finding in sorted(self.findings, key=lambda f: f.todo is None):
            said.append(f"{'mend' if finding.todo else 'note'}: {finding.what}")
            said += [f"      {finding.todo}"] if finding.todo else []
        return "\n".join(said)
