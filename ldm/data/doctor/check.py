"""Checking a set: one pass over its images and captions, and what each check found."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ldm.config import require
from ldm.data.buckets import BucketConfig, cropped
from ldm.data.doctor.diagnosis import Diagnosis, Finding, histogram
from ldm.data.doctor.image_info import ImageInfo, read_image_info, same_files
from ldm.data.doctor.near_duplicates import MOST, ThumbnailFile, near_duplicates
from ldm.data.doctor.page import write_page
from ldm.data.sources import Layout, SampledSource, Source, is_hub_id, open_source
from ldm.data.sources.lost import HINTS, hint_for
from ldm.errors import DataError

NARROW = 3.0  # longer side by shorter side, above which an image is called narrow
FEW = 10  # images
FIRST = 1000  # images of a set on the hub that are read
SHARED = 0.02  # share of the images with the same caption, above which it is reported


def check_data(
    data: str | Path,
    captions: Literal["auto", "names", "whole"] = "auto",
    split: str | None = None,
    resolution: int = 512,
    cut: Callable[[str], str] | None = None,
    page: str | Path | None = None,
    first: int | None = None,
    estimate: Callable[[Source, list[ImageInfo]], Sequence[str]] | None = None,
    layout: Layout = "auto",
    exclude: Sequence[str] = (),
    config: BucketConfig | None = None,
) -> Diagnosis:
    """Check every image and caption of a set, which is never changed. The options are those of `open_source`, and:

    resolution  of the intended training, in pixels
    cut         returns the end of a caption that the text encoder does not see, or ""
    page        where to write one HTML file with images
    first       images to read of a set on the hub, as a stream (1000); 0 downloads and reads all
    estimate    given the usable samples and their infos, returns lines that say what a training would do and take
    config      the buckets of the intended training, in place of `resolution`

    Raises DataError for anything that is no set of images, ConfigError for a page inside the set and for `first` with
    a local set.
    """
    config = config or BucketConfig(resolution, step=min(64, resolution))
    if page is not None:
        inside = Path(data).is_dir() and Path(page).resolve().is_relative_to(Path(data).resolve())
        require(not inside, "lies inside of the data, which is never changed", "page")
    source = _opened(data, first, captions=captions, split=split, layout=layout, exclude=exclude)
    infos: list[ImageInfo] = []
    with ThumbnailFile() as thumbnails:
        for _, (info, thumbnail) in source.validate(read_image_info, desc="images"):
            infos.append(info)
            thumbnails.append(thumbnail)
        if not infos:
            source.require(allow_empty_captions=True)
            raise DataError("holds no images that can be used", where=data)
        image_findings = _image_findings(infos, thumbnails, config)
    findings = [*_sampled(source), *_refusal(source), *_skips(source), *_caption_findings(source, cut), *image_findings]
    diagnosis = _diagnosis(source, infos, config, findings)
    if estimate is not None:
        diagnosis = dataclasses.replace(diagnosis, estimate=list(estimate(source, infos)))
    if page is not None:
        write_page(Path(page), diagnosis, source)
    return diagnosis


def _opened(data: str | Path, first: int | None, **options: Any) -> Source:
    hub = isinstance(data, str) and is_hub_id(data)
    require(hub or not first, "is for a set on the hub; a local set is read as a whole", "first")
    require(first is None or first >= 0, f"must not be negative, got {first}", "first")
    if hub and first != 0:
        return SampledSource(open_source(data, stream=True, **options), first or FIRST)
    return open_source(data, **options)


def _diagnosis(source: Source, infos: list[ImageInfo], config: BucketConfig, findings: list[Finding]) -> Diagnosis:
    counts, sides = source.counts, sorted(min(info.size) for info in infos)
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
        histogram((info.size for info in infos), config),
        sum(sample.repeats for sample in source),
        source.lines(),
        findings,
        [],
    )


def _sampled(source: Source) -> list[Finding]:
    if not isinstance(source, SampledSource) or source.ended:
        return []
    return [Finding("sample", source.counts.found, f"only the first {source.counts.found} images were checked")]


def _refusal(source: Source) -> list[Finding]:
    """The reason why a training would refuse the set."""
    try:
        source.require()
    except DataError as error:
        count = source.counts.missing + source.counts.empty or source.counts.lost().total()
        listed = [[id] for id in source.counts.uncaptioned]
        return [Finding("refused", count, f"training refuses this set: {error.what}", error.hint, listed)]
    return []


def _skips(source: Source) -> list[Finding]:
    counts, kinds = source.counts, {}
    for skip in counts.skipped:
        place = skip.where.removeprefix(str(Path(source.path).resolve()) + "/")
        kinds.setdefault(skip.reason, []).append(f"{place} ({skip.detail})" if skip.detail else place)
    findings = [
        _left_out(reason, len(places), places, HINTS.get(reason, "replace or remove them (--json lists all)"))
        for reason, places in kinds.items()
    ]
    for reason, count in counts.aside.items():
        hint = None if reason in counts.chosen else hint_for(counts, reason)
        findings.append(_left_out(reason, count, counts.aside_places[reason], hint))
    return findings


def _left_out(reason: str, count: int, places: list[str], hint: str | None) -> Finding:
    what = f"{count} left out ({reason}): {places[0]}" + (", …" if count > 1 else "")
    return Finding("skipped", count, what, hint, [[place] for place in places])


def _caption_findings(source: Source, cut: Callable[[str], str] | None) -> list[Finding]:
    findings, texts, cut_off = [], {}, {}
    for sample in source:
        for text in sample.captions:
            texts.setdefault(text, []).append(sample.id)
            if cut is not None and (end := cut(text)):
                cut_off[sample.id] = end
    if cut_off:
        example, end = next(iter(cut_off.items()))
        what = f"{len(cut_off)} captions are too long for the text encoder; it loses {end!r:.80} of {example}"
        findings.append(Finding("long captions", len(cut_off), what, "shorten them", [[id] for id in cut_off]))
    for text, ids in sorted(texts.items(), key=lambda item: (-len(item[1]), item[0]))[:5]:
        if len(ids) > max(FEW, SHARED * source.counts.used):
            what = f"{len(ids)} images share the caption {text!r:.80}"
            findings.append(Finding("shared caption", len(ids), what, "tell them apart, or keep a few of them", [ids]))
    return findings


def _image_findings(infos: list[ImageInfo], thumbnails: ThumbnailFile, config: BucketConfig) -> list[Finding]:
    findings, resolution = [], config.resolution

    def add(kind: str, groups: list[list[str]], what: str, hint: str | None = None) -> None:
        if groups:
            findings.append(Finding(kind, sum(map(len, groups)), what, hint, groups))

    copies = same_files(infos)
    extra = sum(map(len, copies)) - len(copies)
    add("copies", copies, f"{extra} files are copies or links of others, byte for byte", "keep one of each group")
    similar, crowded = near_duplicates(infos, thumbnails)
    extra = sum(map(len, similar)) - len(similar)
    add(
        "near duplicates",
        similar,
        f"{extra} images look like another file's image",
        "look at the groups, keep one of each",
    )
    if crowded:
        what = f"{crowded} images have so many candidates that each was compared with only {MOST} of them"
        findings.append(Finding("near duplicates", 0, what))
    tiny = [[info.id] for info in sorted(infos, key=lambda info: min(info.size)) if 2 * min(info.size) < resolution]
    what = f"{len(tiny)} images would be enlarged more than twice at {resolution}"
    add("tiny", tiny, what, "remove them, or train at a lower resolution")
    narrow = sorted(
        (info for info in infos if max(info.size) > NARROW * min(info.size)), key=lambda i: -cropped(i.size, config)
    )
    worst = ", ".join(f"{info.id} {100 * cropped(info.size, config):.0f} %" for info in narrow[:3])
    what = f"{len(narrow)} images are more than {NARROW:g} times as long as wide; cropped away of the worst: {worst}"
    add("narrow", [[info.id] for info in narrow], what)
    blank = [[info.id] for info in infos if info.blank]
    add("blank", blank, f"{len(blank)} images show nothing on a white background", "remove them")
    for kind, what in (
        ("turned", "images are turned by EXIF; they are read upright"),
        ("animated", "images are animated; the first frame is used"),
        ("transparent", "images may be transparent; their background becomes white"),
    ):
        ids = [[info.id] for info in infos if getattr(info, kind)]
        add(kind, ids, f"{len(ids)} {what}")
    profiles = [[info.id] for info in infos if info.profile]
    names = ", ".join(
        f"{name} {count}" for name, count in Counter(i.profile for i in infos if i.profile).most_common(3)
    )
    add("profile", profiles, f"{len(profiles)} images have other colours than sRGB ({names}); they are converted")
    if len(infos) < FEW:
        findings.append(Finding("few", len(infos), f"only {len(infos)} images: a training will repeat them often"))
    return findings
