"""Images that were counted as good, and could not be read or encoded later: left out, as many as the settings allow."""

from __future__ import annotations

from collections.abc import Mapping

from ldm.console import warn
from ldm.data.sources import Sample
from ldm.errors import DataError, LdmError
from ldm.training.data.images import ImageSet


def lose(images: ImageSet, place: int, error: LdmError) -> None:
    """Leave out an image that was counted as good. Raises DataError where too many are left out."""
    id, counts, allowed = images.items[place].id, images.source.counts, images.data.max_bad
    if id not in images.lost:
        warn(f"{error}; left out")
    images.lost[id] = error
    if counts.lost().total() + len(images.lost) > (allowed * counts.found if allowed < 1 else allowed):
        leave_out(images, images.lost)  # raises, and names them


def leave_out(images: ImageSet, bad: Mapping[str, LdmError]) -> None:
    """Count these images, by id, as skipped. Raises DataError where they are more than `max_bad` allows."""

    def check(sample: Sample) -> None:
        if error := bad.get(sample.id):
            raise error if isinstance(error, DataError) else DataError(error.what)

    for _ in images.source.validate(check, desc="leaving out"):
        pass
    images.items = [item for item in images.items if item.id not in bad]
    images.held_out &= {item.digest for item in images.items}
    images.require()
