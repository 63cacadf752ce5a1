"""kohya's folders: `10_cat` holds images that an epoch has ten times, and `0_cat` is switched off."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from ldm.data.sources.lost import OUTSIDE
from ldm.data.sources.source import Counts
from ldm.data.sources.splits import LEAST, split_of
from ldm.errors import DataError

REPEATS = re.compile(r"(0|[1-9]\d{0,5})_(.*\S)")
MOST = 999  # repeats; a larger number is probably a year
PLAUSIBLE = 0.5  # share of the images in such folders, from which on they may be meant


@dataclass
class Kohya:
    """The images of a folder as kohya's scripts see them."""

    classes: dict[str, tuple[int, str]] = field(default_factory=dict)  # image -> (repeats, name of its folder)
    regularization: list[str] = field(default_factory=list)  # in reg/ beside img/, as kohya_ss makes it
    outside: list[str] = field(default_factory=list)


class Reading(NamedTuple):
    """How the images of a folder are read."""

    names: list[str]
    classes: Mapping[str, tuple[int, str]]  # image -> (repeats, name of its folder); none where they are not kohya's
    doubt: DataError | None  # that the user has to settle


def images_of_kohya(names: list[str], layout: str, where: object, counts: Counts) -> Reading:
    """Those of the images that are in kohya's folders and not switched off; all where the folders are not kohya's."""
    found = read_kohya(names)
    is_kohya, note, doubt = choose_kohya(found, layout, where)
    counts.notes += [note] if note else []
    if not is_kohya:
        return Reading(names, {}, doubt)
    for name, (repeats, title) in found.classes.items():
        if not repeats:
            counts.leave(name, f"switched off by the name of its folder, 0_{title}", chosen=True)
    for name in [*found.outside, *found.regularization]:
        counts.leave(name, OUTSIDE, chosen=layout == "kohya")
    return Reading([name for name in names if found.classes.get(name, (0, ""))[0]], found.classes, doubt)


def read_kohya(names: Sequence[str]) -> Kohya:
    """Sort images by the folders `10_name` that they lie in: at the top, in a split's folder, or in img/."""
    found = Kohya()
    for name in names:
        folders = PurePosixPath(name).parts[:-1]
        folders = folders[1:] if folders and split_of(name) else folders
        folders = folders[1:] if len(folders) > 1 and folders[0] == "img" else folders
        match = REPEATS.fullmatch(folders[0]) if folders else None
        if match:
            found.classes[name] = int(match[1]), match[2].strip()
        else:
            found.outside.append(name)
    if any(name.startswith("img/") for name in found.classes):
        found.regularization = [name for name in found.outside if name.startswith("reg/")]
        found.outside = [name for name in found.outside if not name.startswith("reg/")]
    return found


def choose_kohya(found: Kohya, layout: str, where: object) -> tuple[bool, str, DataError | None]:
    """(whether the images are read as kohya's, a note, a doubt that the user has to settle)."""
    total, used = len(found.classes) + len(found.outside) + len(found.regularization), len(found.classes)
    if layout == "kohya" and not found.classes:
        raise DataError("has no folders of kohya's, such as 10_cat", where=where, hint="use --layout files")
    if layout != "auto" or not used:
        return layout == "kohya", "", None
    ways = f"--layout kohya uses {used} of {total} images, with their repeats; --layout files all {total}, once each"
    if found.regularization:
        what = (
            f"is a project of kohya_ss: {used} images in img, and {len(found.regularization)} of regularization in reg"
        )
        img, reg = (shlex.quote(f"{where}/{name}") for name in ("img", "reg"))
        hint = f"give {img}, and --prior {reg} for the others"
        return True, "", DataError(what, where=where, hint=hint)
    if odd := [f"{times}_{name}" for times, name in found.classes.values() if times > MOST]:
        return False, "", DataError(f"{odd[0]} is a folder: is its number one of repeats?", where=where, hint=ways)
    if used >= LEAST * total:
        return True, "", None
    folders = Counter(f"{times}_{name}" for times, name in found.classes.values())
    listed = ", ".join(f"{folder} {count}" for folder, count in folders.most_common(3))
    if used >= PLAUSIBLE * total:
        what = f"{used} of {total} images are in folders such as kohya's ({listed}), the others are not"
        return False, "", DataError(f"{what} ({found.outside[0]})", where=where, hint=ways)
    return False, f"{used} images in folders such as kohya's ({listed}) are not repeated (--layout kohya does)", None
