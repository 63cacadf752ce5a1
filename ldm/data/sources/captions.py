"""Caption files, the same in folders and in tars: .txt and .caption with one caption a line, .json with a field."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from ldm.data.sources.rows import CAPTION_COLUMNS, caption_column
from ldm.data.sources.source import captions_of

CAPTION_SUFFIXES = (".txt", ".caption", ".json")  # in any case; the first that holds a caption is read
MAX_CAPTIONS = 1 << 20  # bytes of a caption file
LINE_ENDS = re.compile(r"\r\n|\r|\n")
MARKUP = ("<?xml", "<x:xmpmeta", "<rdf:", "<!doctype", "<html", "{\\rtf")
NEEDED = f"none of {', '.join(CAPTION_COLUMNS[:3])}"


class Captions(NamedTuple):
    """What a caption file says."""

    texts: tuple[str, ...] = ()
    fault: str = ""  # why it is no caption; the same for all of one kind
    detail: str = ""
    found: bool = True  # a caption is there, even an empty one
    paragraphs: bool = False  # blank lines part its lines


def parse_captions(data: bytes, suffix: str, whole: bool = False) -> Captions:
    """The captions in the bytes of a file: one on each line that is not blank, or all as one where it is `whole`.

    A file of JSON, whatever its name, has its caption in a field; XML, HTML and pointers of git-lfs are no captions.
    """
    if len(data) > MAX_CAPTIONS:
        return Captions(fault="caption is longer than a megabyte")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Captions(fault="caption is UTF-16, not UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Captions(fault="caption is not UTF-8", detail=f"byte {error.start}")
    start = text[:40].lstrip().lower()
    if suffix == ".json" or start.startswith(("{", "[{")):
        found = _of_json(text, suffix)
        if found is not None:
            return found
    if start.startswith(MARKUP):
        return Captions(fault="caption is XML, HTML or RTF, no text")
    if start.startswith("version https://git-lfs"):
        return Captions(fault="caption is a pointer of git-lfs", detail="run git lfs pull")
    lines = LINE_ENDS.split(text)
    texts, fault = captions_of("\n".join(lines) if whole else lines)
    detail = f"byte {data.index(0)}" if b"\0" in data else ""
    return Captions(texts, fault, detail, paragraphs=not whole and _has_paragraphs(lines))


def _has_paragraphs(lines: list[str]) -> bool:
    filled = [i for i, line in enumerate(lines) if line.strip()]
    return len(filled) > 1 and filled[-1] - filled[0] >= len(filled)


def _of_json(text: str, suffix: str) -> Captions | None:
    """The caption field of a JSON file; None for text that only begins like JSON."""
    try:
        values: Any = json.loads(text)
    except (ValueError, RecursionError):
        return Captions(fault="its .json is not JSON") if suffix == ".json" else None
    if isinstance(values, dict) and (column := caption_column(list(values))):
        texts, fault = captions_of(values[column])
        return Captions(texts, fault, f"{column}: {values[column]!r:.60}" if fault else "")
    fields = f"its fields are {', '.join(map(repr, values))[:120]}" if isinstance(values, dict) else "no object"
    if suffix == ".json":
        return Captions(detail=f"{fields}, {NEEDED}", found=False)
    return Captions(fault="caption is JSON without a caption", detail=f"{fields}, {NEEDED}")
