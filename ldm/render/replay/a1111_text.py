"""The `parameters` text of A1111 and its relatives, taken apart: prompt, negative prompt, fields.

    a cat,
    on two lines
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, Lora hashes: "a: b, c: d"

Values that hold a comma, a colon or a line end are JSON strings; some programs write JSON objects and lists bare.
Every character of the fields ends up in a field or in `rest`. Time and memory grow with the text's length alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ldm.errors import DataError

MAX_TEXT = 1 << 20  # characters
FIRST_FIELD = b"Steps:"
NEGATIVE = "Negative prompt:"
# The last line holds fields if it has at least three, as in A1111, and one of these; otherwise it is prompt.
FIELDS_NEEDED, TELLING = 3, frozenset({"Steps", "Sampler", "CFG scale", "Seed", "Size"})
MAX_UNCLOSED = 20  # brackets that are not closed: each was searched for to the end of the line

_KEY = re.compile(r"\w[\w \-/.()+]{1,99}")
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"', re.DOTALL)
_END = re.compile(r"\s*(?:,|$)")
_MARKS = re.compile(r'[][{}"]')
_CLOSES = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Infotext:
    """A `parameters` text: its two prompts, its fields in their order, and the rest."""

    prompt: str
    negative_prompt: str
    fields: tuple[tuple[str, str], ...]
    rest: tuple[str, ...]  # pieces of the line of fields that are no field


def read_infotext(text: str) -> Infotext:
    """Take a text apart. Raises DataError where it is longer than a million characters."""
    if len(text) > MAX_TEXT:
        raise DataError(f"the parameters text has {len(text):,} characters, more than {MAX_TEXT:,}")
    lines = text.replace("\r\n", "\n").strip().split("\n")
    start = _first_line_of_fields(lines)
    prompts = {False: [], True: []}  # not in the negative prompt yet, in it
    negative = False
    for line in lines[:start]:
        if line.strip().startswith(NEGATIVE) and not negative:
            negative, line = True, line.strip()[len(NEGATIVE) :]
        prompts[negative].append(line)
    fields, rest = [], []
    for line in lines[start:]:
        line_fields, line_rest = split_fields(line)
        fields += line_fields
        rest += line_rest
    return Infotext(*("\n".join(prompts[key]).strip() for key in (False, True)), tuple(fields), tuple(rest))


def read_infotexts(data: bytes) -> list[str]:
    """The texts in a file that A1111 writes beside images, each with its line of fields; [] for any other file.

    A prompt file is any other file: no line of it begins with `Steps:` and has A1111's fields.
    """
    if len(data) > MAX_TEXT or FIRST_FIELD not in data:
        return []
    texts: list[str] = []
    lines: list[str] = []
    for line in data.decode("utf-8-sig", "replace").splitlines():
        lines.append(line)
        if line.lstrip().startswith("Steps:") and _are_fields(line):
            texts.append("\n".join(lines).strip())
            lines = []
    return texts if not "".join(lines).strip() or len(texts) == 1 else []


def _first_line_of_fields(lines: list[str]) -> int:
    """Where the fields begin: in the last line, or in the last one that begins with Steps and has enough of them.

    Behind it some programs write more lines (Template: …, Version: …).
    """
    if _are_fields(lines[-1]):
        return len(lines) - 1
    for i in range(len(lines) - 2, -1, -1):
        if lines[i].lstrip().startswith("Steps:"):
            return i if _are_fields(lines[i]) else len(lines)
    return len(lines)


def _are_fields(line: str) -> bool:
    fields, _ = split_fields(line)
    return len(fields) >= FIELDS_NEEDED and any(key in TELLING for key, _ in fields)


def split_fields(line: str) -> tuple[list[tuple[str, str]], list[str]]:
    """([(key, value), …] of `Key: value, Key: "value, quoted"`, the pieces between commas that are no field)."""
    fields, rest, position, unclosed = [], [], 0, 0
    while position < len(line):
        comma = line.find(",", position)
        comma = len(line) if comma < 0 else comma
        colon = line.find(":", position, comma)
        key = line[position:colon].strip() if colon >= 0 else ""
        if not _KEY.fullmatch(key):
            rest += [line[position:comma].strip()] if line[position:comma].strip() else []
            position = comma + 1
            continue
        start = colon + 1 + (len(line[colon + 1 : comma]) - len(line[colon + 1 : comma].lstrip()))
        end = _end_of_quoted(line, start)
        if end is None and unclosed < MAX_UNCLOSED and line[start : start + 1] in _CLOSES:
            end = _end_of_bracket(line, start)
            unclosed += end is None
        fields.append((key, _unquoted(line[start : end or comma].strip())))
        position = _END.match(line, end).end() if end else comma + 1
    return fields, rest


def _end_of_quoted(line: str, start: int) -> int | None:
    """Where a quoted value ends, if one begins at `start` and a comma or the end follows it."""
    match = _QUOTED.match(line, start)
    return match.end() if match and _END.match(line, match.end()) else None


def _end_of_bracket(line: str, start: int) -> int | None:
    """As `_end_of_quoted`, of a [list] or an {object}; brackets in quotes do not count."""
    opened, position = [], start
    while match := _MARKS.search(line, position):
        mark, position = match[0], match.end()
        if mark == '"':
            quoted = _QUOTED.match(line, match.start())
            position = quoted.end() if quoted else position
        elif mark in _CLOSES:
            opened.append(_CLOSES[mark])
        elif not opened or opened.pop() != mark:
            return None
        if not opened:
            return position if _END.match(line, position) else None
    return None


def _unquoted(value: str) -> str:
    if len(value) < 2 or value[0] != '"' or value[-1] != '"':
        return value
    try:
        text = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return text if isinstance(text, str) else value
