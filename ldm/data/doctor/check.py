"""Checking a set: one pass over its images and captions, and what each check found."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ldm.config import require
from ldm.data.buckets import BucketConfig, histogram
from ldm.data.doctor.diagnosis import Diagnosis, Finding
from ldm.data.doctor.image_info import Look, look, same_files
from ldm.data.doctor.near_duplicates import MOST, ThumbnailFile, alike
from ldm.data.doctor.page import write_page
from ldm.data.sources import FirstSource, Source, is_hub_id, open_source
from ldm.errors import DataError

NARROW = 3.0  # longer side by shorter, from which on a picture is called narrow
FEW = 10  # pictures
FIRST = 1000  # pictures of a set on the hub
SHARED = 0.02  # of the pictures with one and the same caption, from which on it is told


def check_data(
    data: str | Path,
    captions: Literal["auto", "names"] = "auto",
    split: str = "train",
    resolution: int = 512,
    cut: Callable[[str], str] | None = None,
    page: str | Path | None = None,
    first: int | None = None,
    estimate: Callable[[int], Sequence[str]] | None = None,
) -> Diagnosis:
    """Look at every picture and caption of a set. Options as in `open_source`; nothing of the set is changed.

    `resolution` (px) is that of the training in mind, `cut` gives the end of a caption that its text encoder will not
    see, `page` is where one HTML file with pictures is written. Of a set on the hub only the `first` pictures (1000)
    are looked at, which are read as they come; 0 downloads and reads all. `estimate` says in some lines what a training
    would take with so many samples an epoch. Raises DataError for what is no set of pictures, ConfigError for a page
    inside of the set, and for `first` of a set that is here.
    """
    config = BucketConfig(resolution, step=min(64, resolution))
    if page is not None:
        inside = Path(data).is_dir() and Path(page).resolve().is_relative_to(Path(data).resolve())
        require(not inside, "lies inside of the data, which is never changed", "page")
    source = _opened(data, captions, split, first)
    looks: list[Look] = []
    with ThumbnailFile() as smalls:
        for _, (seen, small) in source.sift(look, desc="pictures"):
            looks.append(seen)
            smalls.append(small)
        if not looks:
            source.require(allow_empty_captions=True)
            raise DataError("holds no pictures that can be used", where=data)
        of_pictures = _of_pictures(looks, smalls, resolution)
    findings = [*_sampled(source), *_refusal(source), *_skips(source), *_of_captions(source, cut), *of_pictures]
    diagnosis = _diagnosis(source, looks, config, findings)
    if estimate is not None:
        diagnosis = dataclasses.replace(diagnosis, estimate=list(estimate(diagnosis.epoch)))
    if page is not None:
        write_page(Path(page), diagnosis, source)
    return diagnosis


def _opened(data: str | Path, captions: Literal["auto", "names"], split: str, first: int | None) -> Source:
    hub = isinstance(data, str) and is_hub_id(data)
    require(hub or not first, "is for a set on the hub; of one that is here all is read", "first")
    require(first is None or first >= 0, f"must not be negative, got {first}", "first")
    if hub and first != 0:
        return FirstSource(open_source(data, captions, split, stream=True), first or FIRST)
    return open_source(data, captions, split)


def _diagnosis(source: Source, looks: list[Look], config: BucketConfig, findings: list[Finding]) -> Diagnosis:
    counts, sides = source.counts, sorted(min(seen.size) for seen in looks)
    words = Counter(len(text.split()) for sample in source for text in sample.captions)
    return Diagnosis(
        source.path,
        source.layout,
        config.resolution,
        counts.found,
        counts.used,
        dict(counts.reasons().most_common()),
        counts.captions,
        dict(sorted(words.items())),
        (sides[0], sides[len(sides) // 2], sides[-1]),
        histogram((seen.size for seen in looks), config),
        sum(sample.repeats for sample in source),
        source.lines(),
        findings,
        [],
    )


def _sampled(source: Source) -> list[Finding]:
    if not isinstance(source, FirstSource) or source.ended:
        return []
    return [Finding("sample", source.counts.found, f"only the first {source.counts.found} pictures were looked at")]


def _refusal(source: Source) -> list[Finding]:
    """Why a training would not begin."""
    try:
        source.require()
    except DataError as error:
        count = source.counts.missing + source.counts.empty or len(source.counts.skipped)
        listed = [[id] for id in source.counts.uncaptioned]
        return [Finding("refused", count, f"training refuses this set: {error.what}", error.todo, listed)]
    return []


def _skips(source: Source) -> list[Finding]:
    kinds: dict[str, list[str]] = {}
    for skip in source.counts.skipped:
        place = skip.where.removeprefix(str(Path(source.path).resolve()) + "/")
        kinds.setdefault(skip.reason, []).append(f"{place} ({skip.detail})" if skip.detail else place)
    return [
        Finding(
            "skipped",
            len(places),
            f"{len(places)} left out ({reason}): {places[0]}" + (", …" if len(places) > 1 else ""),
            "replace or remove them (--json lists all)",
            [[place] for place in places],
        )
        for reason, places in kinds.items()
    ]


def _of_captions(source: Source, cut: Callable[[str], str] | None) -> list[Finding]:
    findings, texts, lost = [], {}, {}
    for sample in source:
        for text in sample.captions:
            texts.setdefault(text, []).append(sample.id)
            if cut is not None and (end := cut(text)):
                lost[sample.id] = end
    if lost:
        first, end = next(iter(lost.items()))
        what = f"{len(lost)} captions are longer than the text encoder sees; of {first} it loses {end!r:.80}"
        findings.append(Finding("long captions", len(lost), what, "shorten them", [[id] for id in lost]))
    for text, ids in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0]))[:5]:
        if len(ids) > max(FEW, SHARED * source.counts.used):
            what = f"{len(ids)} pictures share the caption {text!r:.80}"
            findings.append(Finding("shared caption", len(ids), what, "tell them apart, or keep a few of them", [ids]))
    return findings


def _of_pictures(looks: list[Look], smalls: ThumbnailFile, resolution: int) -> list[Finding]:
    findings, total = [], len(looks)

    def add(kind: str, groups: list[list[str]], what: str, todo: str | None = None) -> None:
        if groups:
            findings.append(Finding(kind, sum(map(len, groups)), what, todo, groups))

    copies = same_files(looks)
    extra = sum(map(len, copies)) - len(copies)
    add("copies", copies, f"{extra} files are copies or links of others, byte for byte", "keep one of each group")
    near, cut = alike(looks, smalls)
    extra = sum(map(len, near)) - len(near)
    add("alike", near, f"{extra} pictures look like another (of other bytes)", "look at the groups, keep one of each")
    if cut:
        what = f"{cut} pictures are like so many others in outline that each was compared with {MOST} of them alone"
        findings.append(Finding("alike", 0, what))
    tiny = [[seen.id] for seen in sorted(looks, key=lambda s: min(s.size)) if 2 * min(seen.size) < resolution]
    what = f"{len(tiny)} pictures would be enlarged more than twice at {resolution}"
    add("tiny", tiny, what, "remove them, or train at a lower resolution")
    narrow = [[s.id] for s in looks if max(s.size) > NARROW * min(s.size)]
    add(
        "narrow", narrow, f"{len(narrow)} pictures are more than {NARROW:g} times as long as wide: much is cropped away"
    )
    blank = [[s.id] for s in looks if s.blank]
    add("blank", blank, f"{len(blank)} pictures show nothing on a white ground", "remove them")
    for kind, chosen, what in (
        ("turned", [s.id for s in looks if s.turned], "pictures are turned by EXIF; they are read upright"),
        ("animated", [s.id for s in looks if s.animated], "pictures are animated; the first frame is taken"),
        ("transparent", [s.id for s in looks if s.transparent], "pictures may be transparent; they are laid on white"),
    ):
        add(kind, [[id] for id in chosen], f"{len(chosen)} {what}")
    if total < FEW:
        findings.append(Finding("few", total, f"only {total} pictures: a training will repeat them often"))
    return findings
