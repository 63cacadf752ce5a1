"""Why a set that lost images or lacks captions cannot be trained on, and what mends it."""

from __future__ import annotations

from glob import escape
from itertools import islice
from typing import TYPE_CHECKING

from ldm.errors import DataError

if TYPE_CHECKING:
    from ldm.data.sources.source import Counts

LISTED = 10  # places named in one line
ELSEWHERE = "is a link out of the folder"
NO_ROW = "without a row in the metadata"
NO_NAME, NO_IMAGE = "has no file_name", "no such image"
OUTSIDE = "outside of kohya's folders"
BESIDE = "beside another image of its key"
DISGUISED = "is an image with a suffix of something else"
EXCLUDE = "leave them out by --exclude PATTERN"
HINTS = {  # what mends each kind of loss
    NO_NAME: "name the column of files file_name, or take other captions by --layout files",
    ELSEWHERE: "copy the folder with what its links lead to (cp -rL FOLDER COPY), and give the copy",
    NO_ROW: f"write their rows, {EXCLUDE}, or take other captions by --layout files",
    OUTSIDE: f"{EXCLUDE}, or read all images once by --layout files",
    BESIDE: f"give each image a key of its own, or {EXCLUDE}",
    "is of a kind that is not read": f"convert or fetch them, or {EXCLUDE}",
    "has colours that are not read": f"convert them to sRGB, or {EXCLUDE}",
    "caption is UTF-16, not UTF-8": "save them as UTF-8, as iconv -f UTF-16 -t UTF-8 does",
    "caption is not UTF-8": "save them as UTF-8, as iconv -f LATIN1 -t UTF-8 does",
    DISGUISED: f"rename them, such as cat.png, or {EXCLUDE}",
}


def too_many_lost(counts: Counts, where: str, max_bad: float) -> DataError:
    """The error for a set of which more cannot be used than `max_bad` allows: all reasons, and what mends the first."""
    lost = counts.lost()
    kinds = "; ".join(f"{reason} {n}" for reason, n in lost.most_common())
    allowed = f"{max_bad:.3g}" if max_bad >= 1 or max_bad == 0 else f"{100 * max_bad:.3g} %"
    most = lost.most_common(1)[0][0]
    what = f"{lost.total()} of {counts.found} cannot be used, {allowed} are allowed: {kinds}; the first: "
    return DataError(what + first_of(counts, most), where=where, hint=hint_for(counts, most))


def captions_lacking(counts: Counts, where: str) -> DataError:
    """The error for images without a caption, with their first names."""
    lacking = counts.missing + counts.empty
    listed = ", ".join(islice(counts.uncaptioned, LISTED)) + (", …" if lacking > LISTED else "")
    return DataError(
        f"{lacking} of {counts.used} images have no caption ({counts.missing} missing, {counts.empty} empty):"
        f" {listed}{counts.beside}",
        where=where,
        hint="write them, or allow empty captions",
    )


def hint_for(counts: Counts, reason: str) -> str:
    """What mends a loss, with the pattern that leaves it out where one is enough."""
    if reason.startswith(("in the split ", "in no split")):
        return "choose by --split NAME, or read everything by --split all"
    hint, places = HINTS.get(reason, "mend them or raise max_bad"), counts.aside_places.get(reason, [])
    tops = {place.partition("/")[0] for place in places}
    if counts.aside[reason] == len(places) == 1:
        return hint.replace("PATTERN", f"'{escape(places[0])}'")
    if counts.aside[reason] == len(places) and len(tops) == 1 and all("/" in place for place in places):
        return hint.replace("PATTERN", f"'{escape(tops.pop())}/*'")
    return hint


def first_of(counts: Counts, reason: str) -> str:
    """The first place with this reason, and its detail."""
    places = (str(skip) for skip in counts.skipped if skip.reason == reason)
    return next(places, "") or f"{counts.aside_places[reason][0]}: {reason}"
