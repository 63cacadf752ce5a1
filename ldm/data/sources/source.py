"""What every layout is read as: samples in a fixed order, and counts of what was found, used and left out, and why."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ldm.console import progress
from ldm.data.images import WHITE, Header, ImageError, read_header, read_image
from ldm.data.sources.lost import LISTED, captions_lacking, too_many_lost
from ldm.errors import DataError
from ldm.prompts import plain_text

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
MAX_BAD = 0.05  # share of the images that may be unusable
SHOWN = 3  # images whose captions are printed


@dataclass(frozen=True)
class Sample:
    """One image with its captions: `()` where it has none; several are alternatives."""

    id: str  # its place in the set, the same on every machine: sub/cat.png, 00000.tar/0001.jpg, a.parquet#7
    captions: tuple[str, ...]
    repeats: int  # how often an epoch has it
    where: str  # the place that messages name
    opener: Callable[[], BinaryIO] = field(repr=False, compare=False)
    mask: Callable[[], BinaryIO] | None = field(default=None, repr=False, compare=False)  # opens the mask beside it

    def open(self) -> BinaryIO:
        """The image's file, for reading and seeking. Raises ImageError where it is gone."""
        try:
            return self.opener()
        except OSError as error:
            raise ImageError("cannot be opened", error.strerror or str(error), where=self.where) from None

    def header(self) -> Header:
        """Size and format, without decoding. Raises ImageError."""
        with self.open() as file:
            return read_header(file, self.where)

    def image(self, at_least: int | None = None, background: tuple[int, int, int] = WHITE) -> Image.Image:
        """The image in RGB, upright: see `ldm.data.images.read_image`. Raises ImageError."""
        with self.open() as file:
            return read_image(file, self.where, at_least, background)


@dataclass(frozen=True)
class Skip:
    """One file or row that cannot be used."""

    where: str
    reason: str  # the same for all of one kind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} ({self.detail})" if self.detail else f"{self.where}: {self.reason}"


@dataclass
class Counts:
    """Counts of a set: found == used + len(skipped) + aside.total()."""

    found: int = 0  # images, and rows that name none
    used: int = 0
    skipped: list[Skip] = field(default_factory=list)  # faults of the data, which count against max_bad
    aside: Counter[str] = field(default_factory=Counter)  # reason -> images that are left out but have no fault
    chosen: set[str] = field(default_factory=set)  # reasons of `aside` that were asked for: these alone are harmless
    aside_places: dict[str, list[str]] = field(default_factory=dict)  # the first ten of each reason
    captions: int = 0  # each alternative counts
    missing: int = 0  # used images with no caption
    empty: int = 0  # used images whose caption exists and is empty
    uncaptioned: dict[str, bool] = field(default_factory=dict)  # id -> whether its caption exists and is empty
    beside: str = ""  # what lies beside images without a caption, and is not read
    notes: list[str] = field(default_factory=list)  # one-line remarks on what was ignored or read differently

    def skip(self, where: object, reason: str, detail: str = "") -> None:
        self.skipped.append(Skip(str(where), reason, detail))

    def leave(self, where: object, reason: str, chosen: bool = False) -> None:
        self.aside[reason] += 1
        if chosen:
            self.chosen.add(reason)
        places = self.aside_places.setdefault(reason, [])
        if len(places) < LISTED:
            places.append(str(where))

    def use(self, id: str, captions: Sequence[str], has_caption: bool = True) -> None:
        """Count one usable image; `has_caption` says whether a caption exists, even an empty one."""
        self.used += 1
        self.captions += len(captions)
        if not captions:
            self.empty += has_caption
            self.missing += not has_caption
            self.uncaptioned[id] = has_caption

    def reasons(self) -> Counter[str]:
        return Counter(skip.reason for skip in self.skipped) + self.aside

    def lost(self) -> Counter[str]:
        """reason -> images that count against `max_bad`: whatever is not used, unless that was asked for."""
        unasked = Counter({reason: n for reason, n in self.aside.items() if reason not in self.chosen})
        return Counter(skip.reason for skip in self.skipped) + unasked


class Source(Sequence[Sample]):
    """The samples of one dataset, always in the same order: `source[i]`, `len(source)`, or by iteration.

    The reader of a layout implements `_sample(position)` for each position that it counted as used. Streams
    (`random_access` False and no length) can only be iterated.
    """

    random_access = True
    repeated = False  # whether an epoch has some images several times

    def __init__(self, path: object, layout: str, counts: Counts, total: int):
        self.path, self.layout, self.counts = str(path), layout, counts
        self.no_captions: DataError | None = None  # raised where there is no caption at all
        self.doubt: DataError | None = None  # raised where the data can be read in ways that use other images
        self._positions: Sequence[int] = range(total)

    def _sample(self, position: int) -> Sample:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._positions[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, self._positions)

    def validate(
        self, check: Callable[[Sample], T] = Sample.header, desc: str = "headers"
    ) -> Iterator[tuple[Sample, T]]:
        """Yield (sample, check(sample)) for all samples; those for which it raises DataError are left out.

        After the last one these are counted as skipped and no longer part of the source.
        """
        kept, counts = array("q"), self.counts
        for position in progress(self._positions, desc=desc, unit="image"):
            sample = self._sample(position)
            try:
                result = check(sample)
            except DataError as error:
                self._drop(sample, error)
                continue
            kept.append(position)
            yield sample, result
        self._positions = kept
        assert counts.found == counts.used + len(counts.skipped) + counts.aside.total()

    def _drop(self, sample: Sample, error: DataError) -> None:
        counts = self.counts
        counts.used -= 1
        counts.captions -= len(sample.captions)
        if sample.id in counts.uncaptioned:
            has_caption = counts.uncaptioned.pop(sample.id)
            counts.empty -= has_caption
            counts.missing -= not has_caption
        reason = getattr(error, "reason", error.what)
        counts.skip(sample.where, reason, getattr(error, "detail", ""))

    def require(self, max_bad: float = MAX_BAD, allow_empty_captions: bool = False) -> None:
        """Raise DataError unless the set can be trained on.

        `max_bad`: the share of the images that may be unusable if it is below 1, else their number. Images without a
        caption are refused unless `allow_empty_captions`; a set without any caption is always refused.
        """
        counts, lost = self.counts, self.counts.lost()
        if not counts.captions and self.no_captions:
            raise self.no_captions
        if self.doubt:
            raise self.doubt
        if lost.total() > (max_bad * counts.found if max_bad < 1 else max_bad):
            raise too_many_lost(counts, self.path, max_bad)
        if not counts.used:
            raise DataError("holds no images that can be used", where=self.path)
        if counts.missing + counts.empty and not allow_empty_captions:
            raise captions_lacking(counts, self.path)

    def lines(self, cut: Callable[[str], str] | None = None) -> list[str]:
        """A summary in a few lines; `cut` returns the end of a caption that the text encoder does not see, or ""."""
        counts, lines = self.counts, [f"{self.path}: {self.layout}"]
        if not self.random_access:
            return lines + [_pair(sample) for sample in islice(self, SHOWN)]
        left = "; ".join(f"{reason} {n}" for reason, n in counts.reasons().most_common())
        skipped = counts.found - counts.used
        lines.append(f"{counts.found} found: {counts.used} used, {skipped} skipped" + (f": {left}" if left else ""))
        lines.append(f"{counts.captions} captions; {counts.missing} missing, {counts.empty} empty")
        lines += counts.notes
        if cut is not None:
            lines += over_long(self, cut)
        return lines + [_pair(sample) for sample in islice(self, SHOWN)]


def _pair(sample: Sample) -> str:
    return f"  {sample.id}: {' | '.join(sample.captions) or '(no caption)'}"


def over_long(source: Source, cut: Callable[[str], str]) -> list[str]:
    """One line about captions that are too long for the text encoder, with examples of what it loses; [] if none."""
    count, examples = 0, []
    for sample in progress(source, desc="captions", unit="image"):
        for unseen in filter(None, map(cut, sample.captions)):
            count += 1
            if len(examples) < SHOWN:
                examples.append(f"{sample.id} loses {shorten(unseen)!r}")
    return [f"{count} captions are too long for the text encoder: {'; '.join(examples)}"] if count else []


def shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def fault_of(text: str) -> str:
    """Why this text cannot be a caption, or ""."""
    if "\0" in text:
        return "caption holds a NUL"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "caption holds half a character"
    return ""


def captions_of(value: object) -> tuple[tuple[str, ...], str]:
    """(captions, fault) of one field: a text, or several of them; `()` for None, empty and blank.

    They are plain texts: see `ldm.prompts.plain_text`.
    """
    texts = [value] if isinstance(value, str) or value is None else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) or text is None for text in texts):
        return (), "caption is not text"
    kept = tuple(stripped for text in texts if (stripped := plain_text((text or "").strip("\ufeff \t\r\n"))))
    fault = next(filter(None, map(fault_of, kept)), "")
    return (() if fault else kept), fault
