"""Files that are left out on request, by patterns."""

from __future__ import annotations

import unicodedata
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from ldm.errors import DataError


def check_excluded(excluded: Counter[str], where: object) -> None:
    """Raise DataError for a pattern that matched nothing: it may be mistyped."""
    for pattern, count in excluded.items():
        if not count:
            hint = "give paths below the folder, such as 'sample/*' or '*.gif'"
            raise DataError(f"--exclude {pattern!r} matches no file", where=where, hint=hint)


def is_excluded(name: str, excluded: Counter[str]) -> bool:
    """Whether a pattern matches a path or a folder above it; counts what each pattern leaves out.

    A folder's path has "/" at its end.
    """
    plain = unicodedata.normalize("NFC", name)
    above = [f"{parent}/" for parent in PurePosixPath(plain).parents][:-1]
    for pattern in excluded:
        wanted = unicodedata.normalize("NFC", pattern).removeprefix("./")
        if any(fnmatchcase(p, wanted) or fnmatchcase(p.rstrip("/"), wanted.rstrip("/")) for p in (plain, *above)):
            excluded[pattern] += 1
            return True
    return False
