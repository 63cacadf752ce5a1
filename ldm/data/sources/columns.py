"""The column of a table, or the field of an object, that holds the captions."""

from __future__ import annotations

from collections.abc import Sequence

CAPTION_COLUMNS = (
    "text",
    "caption",
    "prompt",
    "texts",
    "captions",
    "prompts",
    "additional_feature",
)  # the first that a table has


def rivals(columns: Sequence[str]) -> list[str]:
    """A line about the other columns that could be the captions; [] where there is none."""
    found = [name for name in columns if name and name.lower() in CAPTION_COLUMNS]
    read = caption_column(found)
    others = ", ".join(repr(name) for name in found if name != read)
    return [f"captions are read from {read!r}, not from {others}"] if others else []


def caption_column(columns: Sequence[str]) -> str | None:
    """The column that holds the captions, by its name in any case."""
    named = {column.lower(): column for column in reversed(columns)}
    return next((named[name] for name in CAPTION_COLUMNS if name in named), None)
