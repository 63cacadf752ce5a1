"""JSON in prompt lines, and prompt files that are read whole: .json (up to 32 MB) and .toml (up to 8 MB)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ldm.errors import ConfigError, LdmError
from ldm.files import format_bytes
from ldm.render.prompts.entry import Entry, is_comment, make_entry, open_file
from ldm.render.prompts.line_parser import pairs_of_text
from ldm.render.prompts.line_settings import parse_settings
from ldm.settings_files import distinct, load

MAX_JSON, MAX_TOML = 32 * 10**6, 8 * 10**6  # bytes
DECODER = json.JSONDecoder(object_pairs_hook=distinct)


def pairs_of_json(line: str) -> list[tuple[str, Any]]:
    """A JSON object's members, or a JSON string read as a line of text. Raises ConfigError."""
    return pairs_of_value(decode(line))


def pairs_of_value(value: Any) -> list[tuple[str, Any]]:
    """The settings of an element of a list of prompts: a group of settings, or a line of text."""
    if isinstance(value, str):
        return pairs_of_text(value)
    if not isinstance(value, dict):
        raise ConfigError(f"expected a text or a group of settings, got {value!r:.80}")
    return [(str(word), item) for word, item in value.items() if not is_comment(str(word))]


def decode(text: str) -> Any:
    """The JSON value of `text`, no key twice. Raises ConfigError with the place."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"bad JSON at {place} ({error.msg})") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"bad JSON ({error})") from None
    except RecursionError:
        raise ConfigError("bad JSON (nested too deeply)") from None


def read_json(handle: BinaryIO, name: str, base: Path) -> Iterator[Entry]:
    """A list of groups or texts, element by element; or a group with a list of them under `prompts`."""
    data = handle.read(MAX_JSON + 1)
    if len(data) > MAX_JSON:
        raise ConfigError(
            f"is larger than {format_bytes(MAX_JSON)}", where=name, hint="write .jsonl, which is streamed"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError("is not UTF-8", where=name, hint="save it as UTF-8 text") from None
    del data
    if not text.lstrip(" \t\r\n").startswith("["):
        value, end, line = _json_value(text, 0, 1, name)
        if not isinstance(value, dict) or text[end:].strip():
            raise ConfigError("expected one list or group of settings", where=f"{name}:{line}")
        yield from _grouped(value, name, base, ())
        return
    position, line = text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    position, line = _skip(text, position, line)
    while text[position : position + 1] != "]":
        at = line
        value, position, line = _json_value(text, position, line, name)
        yield make_entry(f"{name}:{at}", at, value, pairs_of_value, base)
        position, line = _skip(text, position, line)
        mark = text[position : position + 1]
        if mark not in (",", "]") or not mark:
            raise ConfigError("bad JSON (expected a comma or the end of the list)", where=f"{name}:{line}")
        if mark == ",":
            position, line = _skip(text, position + 1, line)
    if text[position + 1 :].strip():
        raise ConfigError("bad JSON (something follows the list)", where=f"{name}:{line}")


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip(text: str, position: int, line: int) -> tuple[int, int]:
    end = _SPACE.match(text, position).end()
    return end, line + text.count("\n", position, end)


def _json_value(text: str, position: int, line: int, name: str) -> tuple[Any, int, int]:
    """(value, where it ends, the line of that). Raises ConfigError: what follows bad JSON cannot be read."""
    position, line = _skip(text, position, line)
    try:
        value, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise ConfigError(f"bad JSON ({error.msg})", where=f"{name}:{error.lineno}:{error.colno}") from None
    except ValueError as error:  # a number of too many digits
        raise ConfigError(f"bad JSON ({error})", where=f"{name}:{line}") from None
    except RecursionError:
        raise ConfigError("bad JSON (nested too deeply)", where=f"{name}:{line}") from None
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{name}:{line}") from None
    return value, end, line + text.count("\n", position, end)


def read_toml(path: Path, name: str, base: Path) -> Iterator[Entry]:
    with open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
    if size > MAX_TOML:
        raise ConfigError(
            f"is larger than {format_bytes(MAX_TOML)}", where=path, hint="write .jsonl, which is streamed"
        )
    value = load(path)
    text = path.read_text(encoding="utf-8-sig")
    heads = re.finditer(r"^[ \t]*\[\[[ \t]*(prompts?|prompt[ \t]*\.[ \t]*subset)[ \t]*\]\]", text, re.MULTILINE)
    yield from _grouped(value, name, base, [1 + text.count("\n", 0, head.start()) for head in heads])


def _grouped(data: Mapping[str, Any], name: str, base: Path, lines: Iterable[int]) -> Iterator[Entry]:
    """The prompts of a file that is one group of settings, which hold for all of them.

    prompts = […] or [[prompts]]; kohya's [prompt] with [[prompt.subset]]; or a single prompt. `lines` are those where
    the elements begin, as far as they are known.
    """
    common = dict(data)
    items: Any = [{}]
    key = "prompts" if "prompts" in common else "prompt"
    if isinstance(common.get(key), list):
        items = common.pop(key)
    elif isinstance(common.get(key), dict):
        common |= common.pop(key)
        items = common.pop("subset", [{}])
    if not isinstance(items, list):
        raise ConfigError("expected a list of prompts", where=f"{name} (subset)")
    try:
        shared = parse_settings(pairs_of_value(common), base)
    except LdmError as error:
        raise ConfigError(error.what, where=f"{name} ({error.where})", hint=error.hint) from None
    places = list(lines)
    for i, item in enumerate(items):
        numbered = len(places) == len(items)
        where = f"{name}:{places[i]}" if numbered else f"{name}, entry {i + 1}"
        yield make_entry(where, places[i] if numbered else i + 1, item, pairs_of_value, base, shared)
