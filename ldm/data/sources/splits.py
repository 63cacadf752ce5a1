"""Which split of a set is read. A name alone decides nothing: the folder `train` beside `bus` and `car` is a class."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from ldm.errors import DataError

if TYPE_CHECKING:
    from ldm.data.sources.source import Counts
    from ldm.data.sources.walk import Listing

SPLITS = {"train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test"}
SPLITS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
ALL = "all"  # as the split that is asked for: everything is read
NEARLY_ALL = 0.95  # share of a set that has to lie in splits, and in train, before train alone is read unasked
LEAST = 0.8  # share of a set that a layout uses; with less the user has to choose


class Choice(NamedTuple):
    """The split to read, None for everything; a `note` on what its name could also mean, a `doubt` to be settled."""

    split: str | None
    note: str = ""
    doubt: DataError | None = None


def split_of(name: str) -> str | None:
    """train, validation or test, by the first folder of a path or the beginning of a shard's name; None for neither."""
    parts = PurePosixPath(name).parts
    if len(parts) > 1 and parts[0].lower() in SPLITS:
        return SPLITS[parts[0].lower()]
    if PurePosixPath(name).suffix.lower() in (".tar", ".parquet"):
        return SPLITS.get(re.split(r"[-_.]", parts[-1].lower())[0])
    return None


def images_of_split(listing: Listing, split: str | None, counts: Counts) -> tuple[list[str], DataError | None]:
    """The images of one split, or all, and a doubt about that."""
    sizes = Counter(split_of(name) for name in listing.images)
    choice = choose_split(sizes, split, listing.root)
    counts.notes += [choice.note] if choice.note else []
    if choice.split is None:
        return listing.images, choice.doubt
    names = []
    for name in listing.images:
        its_split = split_of(name)
        if its_split == choice.split:
            names.append(name)
        elif its_split:
            counts.leave(name, f"in the split {its_split}", chosen=split is not None)
        else:
            counts.leave(name, "in no split", chosen=split is not None)
    return names, choice.doubt


def choose_split(sizes: Counter[str | None], asked: str | None, where: object) -> Choice:
    """The split to read of a set with so many images in each (None: in no split).

    Without `asked` it is train, where nearly all lies in it; else everything is read, or there is a doubt. Raises
    DataError for a split that the set does not have.
    """
    known, total = sorted(filter(None, sizes)), sizes.total()
    if asked == ALL or (not known and asked in (None, "train")):
        return Choice(None)
    if asked is None and total - sizes[None] < NEARLY_ALL * total:
        if len(known) == 1:
            amount = f"{sizes[known[0]]} of {total} images"
            note = (
                f"{known[0]} is the name of a split, but only {amount} are in it: all is read (--split {known[0]} reads"
            )
            return Choice(None, f"{note} it alone)")
        return Choice(None, doubt=_doubt(sizes, where))
    split = asked or "train"
    if split not in known:
        raise DataError(f"has no split {split!r}", where=where, hint=f"there is {', '.join(known) or 'none'}")
    if asked is None and sizes[split] < NEARLY_ALL * total:
        return Choice(split, doubt=_doubt(sizes, where))
    return Choice(split)


def _doubt(sizes: Counter[str | None], where: object) -> DataError:
    listed = ", ".join(f"{name or 'in no split'} {count}" for name, count in sizes.most_common())
    ways = [f"--split {name} uses {count}" for name, count in sizes.most_common() if name]
    what = f"has splits, and nothing says which to read: {listed} of {sizes.total()} images"
    return DataError(what, where=where, hint=f"choose: {', '.join([*ways, f'--split {ALL} uses {sizes.total()}'])}")
