"""What every layout becomes: samples in a fixed order, and counts of what was found, used and left out, and why."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from ldm.console import progress
from ldm.data.images import WHITE, Header, PictureError, read_header, read_picture
from ldm.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")
CAPTIONS = (
    "text",
    "caption",
    "prompt",
    "texts",
    "captions",
    "prompts",
    "additional_feature",
)  # columns, the first found
MAX_BAD = 0.05  # share of the pictures found
SHOWN = 3  # pictures with captions at the start
LISTED = 10  # places named in one line


@dataclass(frozen=True)
class Sample:
    """One picture with its captions: `()` where it has none, several where each may be drawn."""

    id: str  # its place in the set, the same on every machine: sub/cat.png, 00000.tar/0001.jpg, a.parquet#7
    captions: tuple[str, ...]
    repeats: int  # times an epoch
    where: str  # the place that messages name
    opener: Callable[[], BinaryIO] = field(repr=False, compare=False)

    def open(self) -> BinaryIO:
        """The file as it was found, for reading and seeking. Raises PictureError where it is gone."""
        try:
            return self.opener()
        except OSError as error:
            raise PictureError("cannot be opened", error.strerror or str(error), where=self.where) from None

    def header(self) -> Header:
        """Size and kind, without decoding. Raises PictureError."""
        with self.open() as file:
            return read_header(file, self.where)

    def picture(self, at_least: int | None = None, ground: tuple[int, int, int] = WHITE) -> Image.Image:
        """In RGB, upright: `ldm.data.images.read_picture`. Raises PictureError."""
        with self.open() as file:
            return read_picture(file, self.where, at_least, ground)


@dataclass(frozen=True)
class Skip:
    """One thing that was found and is not used."""

    where: str
    reason: str  # equal for all of one kind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason} ({self.detail})" if self.detail else f"{self.where}: {self.reason}"


@dataclass
class Counts:
    """found == used + len(skipped) + the sum of aside, of which only the first ten places are kept."""

    found: int = 0  # pictures, and rows that name none
    used: int = 0
    skipped: list[Skip] = field(default_factory=list)  # what is wrong with the data: counts against max_bad
    aside: Counter[str] = field(default_factory=Counter)  # reason -> how many are left out with nothing wrong
    aside_places: dict[str, list[str]] = field(default_factory=dict)
    captions: int = 0  # alternatives counted one by one
    missing: int = 0  # used pictures with no caption
    empty: int = 0  # used pictures whose caption is there and holds nothing
    uncaptioned: dict[str, bool] = field(default_factory=dict)  # id -> whether it is there and empty
    notes: list[str] = field(default_factory=list)  # counted one-line remarks on what was read differently or ignored

    def skip(self, where: object, reason: str, detail: str = "") -> None:
        self.skipped.append(Skip(str(where), reason, detail))

    def leave(self, where: object, reason: str) -> None:
        self.aside[reason] += 1
        places = self.aside_places.setdefault(reason, [])
        if len(places) < LISTED:
            places.append(str(where))

    def use(self, id: str, captions: Sequence[str], there: bool = True) -> None:
        """One picture more; `there` says whether a caption exists, even if it is empty."""
        self.used += 1
        self.captions += len(captions)
        if not captions:
            self.empty += there
            self.missing += not there
            self.uncaptioned[id] = there

    def reasons(self) -> Counter[str]:
        return Counter(skip.reason for skip in self.skipped) + self.aside


class Source(Sequence[Sample]):
    """The samples of one set of data, always in the same order: `source[i]`, `len(source)`, or one by one.

    A reader of a layout gives `_sample(position)` for each position that it counted as used. Streams (`random_access`
    False and no length) can only be gone through.
    """

    random_access = True

    def __init__(self, path: object, layout: str, counts: Counts, total: int):
        self.path, self.layout, self.counts = str(path), layout, counts
        self.no_captions: DataError | None = None  # what to say where not one caption was found
        self._positions: Sequence[int] = range(total)

    def _sample(self, position: int) -> Sample:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Sample:
        return self._sample(self._positions[index])

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, self._positions)

    def sift(self, look: Callable[[Sample], T] = Sample.header, desc: str = "headers") -> Iterator[tuple[Sample, T]]:
        """Go through all pictures: (sample, look(sample)) of each; those where it raises DataError are left out.

        When it has come to its end these are counted as skipped and no longer part of the source.
        """
        kept, counts = array("q"), self.counts
        for position in progress(self._positions, desc=desc, unit="picture"):
            sample = self._sample(position)
            try:
                found = look(sample)
            except DataError as error:
                self._drop(sample, error)
                continue
            kept.append(position)
            yield sample, found
        self._positions = kept
        assert counts.found == counts.used + len(counts.skipped) + counts.aside.total()

    def _drop(self, sample: Sample, error: DataError) -> None:
        counts = self.counts
        counts.used -= 1
        counts.captions -= len(sample.captions)
        if sample.id in counts.uncaptioned:
            there = counts.uncaptioned.pop(sample.id)
            counts.empty -= there
            counts.missing -= not there
        reason = getattr(error, "reason", error.what)
        counts.skip(sample.where, reason, getattr(error, "detail", ""))

    def require(self, max_bad: float = MAX_BAD, allow_empty_captions: bool = False) -> None:
        """Raise DataError unless there is something to learn from.

        `max_bad`: below 1 the share of all found that may be unusable, from 1 on their number. Pictures without a
        caption are refused unless `allow_empty_captions`; with not one caption it always stops.
        """
        counts, bad = self.counts, len(self.counts.skipped)
        if not counts.captions and self.no_captions:
            raise self.no_captions
        if bad > (max_bad * counts.found if max_bad < 1 else max_bad):
            kinds = "; ".join(f"{reason} {n}" for reason, n in Counter(s.reason for s in counts.skipped).most_common())
            allowed = f"{max_bad:.3g}" if max_bad >= 1 or max_bad == 0 else f"{100 * max_bad:.3g} %"
            what = f"{bad} of {counts.found} cannot be used, {allowed} are allowed: {kinds}; the first: "
            raise DataError(what + str(counts.skipped[0]), where=self.path, todo="mend them or raise max_bad")
        if not counts.used:
            raise DataError("holds no pictures that can be used", where=self.path)
        lacking = counts.missing + counts.empty
        if lacking and not allow_empty_captions:
            listed = ", ".join(islice(counts.uncaptioned, LISTED)) + (", …" if lacking > LISTED else "")
            raise DataError(
                f"{lacking} of {counts.used} pictures have no caption ({counts.missing} missing, {counts.empty} empty):"
                f" {listed}",
                where=self.path,
                todo="write them, or allow empty captions",
            )

    def lines(self, cut: Callable[[str], str] | None = None) -> list[str]:
        """What was found, in a few lines; `cut` gives the end of a caption that an encoder will not see, or ""."""
        counts, said = self.counts, [f"{self.path}: {self.layout}"]
        if not self.random_access:
            return said + [_pair(sample) for sample in islice(self, SHOWN)]
        left = "; ".join(f"{reason} {n}" for reason, n in counts.reasons().most_common())
        skipped = counts.found - counts.used
        said.append(f"{counts.found} found: {counts.used} used, {skipped} skipped" + (f": {left}" if left else ""))
        said.append(f"{counts.captions} captions; {counts.missing} missing, {counts.empty} empty")
        said += counts.notes
        if cut is not None:
            said += over_long(self, cut)
        return said + [_pair(sample) for sample in islice(self, SHOWN)]


def _pair(sample: Sample) -> str:
    return f"  {sample.id}: {' | '.join(sample.captions) or '(no caption)'}"


def over_long(source: Source, cut: Callable[[str], str]) -> list[str]:
    """One line on the captions of which an encoder does not see the end, with what is cut of the first; [] if none."""
    count, first = 0, []
    for sample in progress(source, desc="captions", unit="picture"):
        for lost in filter(None, map(cut, sample.captions)):
            count += 1
            if len(first) < SHOWN:
                first.append(f"{sample.id} loses {shorten(lost)!r}")
    return [f"{count} captions are too long for the text encoder: {'; '.join(first)}"] if count else []


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
    """(captions, fault) of one field: a text, or several of them; `()` for None, empty and blank."""
    texts = [value] if isinstance(value, str) or value is None else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) or text is None for text in texts):
        return (), "caption is not text"
    kept = tuple(stripped for text in texts if (stripped := (text or "").strip("\ufeff \t\r\n")))
    fault = next(filter(None, map(fault_of, kept)), "")
    return (() if fault else kept), fault


def caption_column(columns: Sequence[str]) -> str | None:
    """The column that holds the captions, by its name in any case."""
    named = {column.lower(): column for column in reversed(columns)}
    return next((named[name] for name in CAPTIONS if name in named), None)
