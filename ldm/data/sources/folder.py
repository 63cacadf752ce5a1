"""Image files in a folder, with captions from metadata, from files beside them, from kohya's folders or from names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PurePosixPath

from ldm.console import progress
from ldm.data.images import ImageError
from ldm.data.sources.captions import CAPTION_SUFFIXES, MAX_CAPTIONS, Captions, parse_captions
from ldm.data.sources.kohya import images_of_kohya
from ldm.data.sources.metadata import by_metadata, doubt_rows
from ldm.data.sources.names import by_name
from ldm.data.sources.refusals import disguised, few, no_captions, unread_beside
from ldm.data.sources.source import Counts, Sample, Source
from ldm.data.sources.splits import ALL, images_of_split
from ldm.data.sources.walk import Listing, open_file
from ldm.errors import DataError
from ldm.prompts import plain_text

Rows = list[tuple[str, tuple[str, ...], int]]  # path below the root, captions, repeats


class FolderSource(Source):
    """Files in a folder; `rows` are (path below the root, captions, repeats)."""

    def __init__(self, path: Path, root: Path, layout: str, counts: Counts, rows: Rows, masks: Mapping[str, str]):
        super().__init__(path, layout, counts, len(rows))
        self.root, self.rows, self.masks = root, rows, masks
        self.repeated = any(repeats > 1 for _, _, repeats in rows)

    def _sample(self, position: int) -> Sample:
        name, captions, repeats = self.rows[position]
        path = self.root / name
        mask = partial(open_file, self.root / self.masks[name]) if name in self.masks else None
        return Sample(name, captions, repeats, str(path), partial(open_file, path), mask)


def open_folder(path: Path, listing: Listing, captions: str, split: str | None, layout: str) -> FolderSource:
    """The source of a folder of image files. Raises DataError for metadata that is damaged or leads out of it."""
    listing.skipped += disguised(listing) if listing.others else []
    counts = Counts(found=len(listing.images) + len(listing.skipped))
    nested = any("/" in name for name in listing.images)  # else there are neither splits nor kohya's folders
    names, doubt = listing.images, None
    if nested or split not in (None, ALL, "train"):
        names, doubt = images_of_split(listing, split, counts)
    if layout == "metadata" and not listing.metadata:
        raise DataError("has no metadata.jsonl, .csv or .parquet", where=path, hint="use --layout files")
    if captions == "names":
        counts.skipped += listing.skipped
        named, rows = "captions from folder and file names", by_name(names, listing, counts)
    elif listing.metadata and layout in ("auto", "metadata"):
        named, rows = by_metadata(names, listing, counts)
        listing.others |= {name: ".json" for name in sorted(listing.captions) if name.lower().endswith(".json")}
        doubt = doubt or doubt_rows(path, names, listing, counts, layout, lambda: _captioned(names, listing))
    else:
        counts.skipped += listing.skipped
        counts.notes += [f"{few(listing.metadata)} is not read, as asked"] if listing.metadata else []
        classes: Mapping[str, tuple[int, str]] = {}
        if nested or layout == "kohya":
            names, classes, its_doubt = images_of_kohya(names, layout, path, counts)
            doubt = doubt or its_doubt
        named, rows = _by_files(names, listing, counts, classes, captions == "whole")
    _add_notes(listing, counts)
    source = FolderSource(path, listing.root, named, counts, rows, listing.masks)
    source.doubt = doubt
    if counts.missing and not listing.metadata and captions != "names":
        counts.beside = unread_beside(listing, list(counts.uncaptioned))
    if not counts.captions:
        source.no_captions = no_captions(path, listing, captions, counts)
    return source


def _add_notes(listing: Listing, counts: Counts) -> None:
    if listing.masks:
        counts.notes.append(
            f"{len(listing.masks)} masks (NAME-mask.png) are no images of their own: --masks learns what they show"
        )
    if listing.links:
        counts.notes.append(f"{listing.links} images are links to others in the folder")
    if listing.unfollowed:
        what = f"{len(listing.unfollowed)} links to folders or out of the folder are not followed"
        counts.notes.append(f"{what}: {few(listing.unfollowed)}")
    if listing.hidden:
        counts.notes.append(f"{listing.hidden} hidden files and folders are ignored")
    if patterns := [f"{pattern!r} {count}" for pattern, count in listing.excluded.items()]:
        counts.notes.append(f"files and folders that are left out as asked, by pattern: {', '.join(patterns)}")
    kinds = Counter(suffix or "no suffix" for suffix in listing.others.values())
    kinds.update({suffix: len(names) for suffix, names in listing.shards.items() if names})
    if kinds:
        listed = ", ".join(
            f"{count} {kind}" for kind, count in sorted(kinds.most_common(10), key=lambda k: (-k[1], k[0]))
        )
        counts.notes.append(f"{kinds.total()} other files are ignored: {listed}")


# Captions in files beside the images.


class _Beside:
    """Caption files by the names of their images, in any Unicode form, and in any case where one alone is meant."""

    def __init__(self, listing: Listing):
        self.files: dict[str, dict[str, str]] = {}  # stem in NFC -> suffix -> file
        for name in sorted(listing.captions, key=lambda name: (not name.endswith(CAPTION_SUFFIXES), name)):
            path = PurePosixPath(name)
            self.files.setdefault(_stem(name), {}).setdefault(path.suffix.lower(), name)
        self.stems = set(map(_stem, listing.images))
        folded = Counter(stem.casefold() for stem in self.files)
        self.folded = {stem.casefold(): stem for stem in self.files if folded[stem.casefold()] == 1}

    def of(self, image: str) -> dict[str, str]:
        """suffix -> caption file of an image."""
        stem = _stem(image)
        if stem not in self.files:
            other = self.folded.get(stem.casefold(), "")
            return self.files[other] if other and other not in self.stems else {}
        return self.files[stem]


def _captioned(names: list[str], listing: Listing) -> int:
    """How many of the images have a caption file."""
    beside = _Beside(listing)
    return sum(bool(beside.of(name)) for name in names)


def _stem(name: str) -> str:
    return unicodedata.normalize("NFC", name.removesuffix(PurePosixPath(name).suffix))


def _by_files(
    names: list[str], listing: Listing, counts: Counts, classes: Mapping[str, tuple[int, str]], whole: bool
) -> tuple[str, Rows]:
    beside, rows, used, kinds, notes = _Beside(listing), [], set(), Counter(), _Notes()
    for name in progress(names, desc="captions", unit="file"):
        files = beside.of(name)
        used.update(files.values())
        repeats, title = classes.get(name, (1, ""))
        file = next((files[suffix] for suffix in CAPTION_SUFFIXES if suffix in files), "")
        read = _read_captions(listing.root / file, whole) if file else Captions(found=False)
        if read.fault:
            counts.skip(listing.root / file, read.fault, read.detail)
            continue
        texts = read.texts
        if read.found:
            kinds[PurePosixPath(file).suffix.lower()] += 1
            notes.add(name, file, files, read)
        elif title:
            texts = (plain_text(title),)
            notes.from_classes += 1
        else:
            notes.silent += [f"{file}: {read.detail}"] if file else []
        counts.use(name, texts, has_caption=read.found)
        rows.append((name, texts, repeats))
    counts.notes += notes.lines()
    for name in listing.images:  # those that are set aside have captions too
        used.update(beside.of(name).values())
    unused = listing.captions - used
    if orphans := {name for name in unused if not name.lower().endswith(".json")}:
        counts.notes.append(f"{len(orphans)} caption files belong to no image: {few(orphans)}")
    listing.others |= dict.fromkeys(sorted(unused - orphans), ".json")
    read = " and ".join(f"{kind} files" for kind, _ in kinds.most_common())
    layout = f"images with captions in {read}" if read else "images without captions"
    if classes:
        repeats = ", ".join(map(str, sorted({times for times, _ in classes.values() if times})))
        layout = f"kohya's folders, repeats {repeats}, captions in {read or 'their names'}"
    return layout, rows


class _Notes:
    """What is worth a line about the caption files of a folder."""

    def __init__(self):
        self.both: list[str] = []
        self.several: list[str] = []
        self.paragraphs, self.alternatives, self.from_classes = 0, 0, 0
        self.other_case: list[str] = []
        self.silent: list[str] = []

    def add(self, image: str, file: str, files: dict[str, str], read: Captions) -> None:
        self.both += [image] if {".txt", ".caption"} <= files.keys() else []
        self.other_case += [file] if _stem(file) != _stem(image) else []
        if len(read.texts) > 1:
            self.several.append(file)
            self.alternatives += len(read.texts)
            self.paragraphs += read.paragraphs

    def lines(self) -> list[str]:
        found = []
        if self.both:
            found.append(f"{len(self.both)} images have a .txt and a .caption: the .txt is read ({few(self.both)})")
        if self.several:
            what = (
                f"{len(self.several)} caption files have several lines: each of their {self.alternatives} lines is an"
            )
            parted = f"; in {self.paragraphs} files they are paragraphs" if self.paragraphs else ""
            found.append(f"{what} alternative caption{parted} (--captions whole joins them): {few(self.several)}")
        if self.other_case:
            what = "caption files are found although capital letters differ"
            found.append(f"{len(self.other_case)} {what}: {few(self.other_case)}")
        if self.silent:
            found.append(f"{len(self.silent)} .json files have no caption: {self.silent[0]}")
        if self.from_classes:
            found.append(f"{self.from_classes} captions are the names of kohya's folders")
        return found


def _read_captions(path: Path, whole: bool) -> Captions:
    try:
        with open_file(path) as file:
            data = file.read(MAX_CAPTIONS + 1)
    except (OSError, ImageError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        return Captions(fault="caption cannot be read", detail=detail)
    return parse_captions(data, path.suffix.lower(), whole)
