"""Parsers of a prompt line's values: (value, word, folder) -> the checked value under our name.

A value is what a file holds: a text, or a number or list where the format has these. `word` is the line's own word for
the setting, for errors; paths are looked up from `folder`. All raise ConfigError.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ldm.config import require
from ldm.device import check_dtype, check_quantization
from ldm.diffusion.names import resolve, resolve_spacing
from ldm.errors import ConfigError
from ldm.file_names import spelt_alike
from ldm.pipeline.checks import check_guidance, check_int, check_prompts, check_size
from ldm.pipeline.keywords import MAX_IMAGES

MAX_SEED = 2**63 - 1 - MAX_IMAGES  # image k of a line has seed + k
Parser = Callable[[Any, str, Path], Any]


def number(value: Any) -> Any:
    """A text that is a number as that number, anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"[-+]?[0-9]{1,30}", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][-+]?[0-9]{1,3})?", text):
        return float(text)
    return value


def prompt(value: Any, word: str, _folder: Path) -> str:
    """A text that can be drawn."""
    require(isinstance(value, str), f"expected a text, got {value!r:.80}", word)
    return check_prompts(value, word)[0]


def whole(least: int, most: int) -> Parser:
    """A parser of whole numbers from `least` to `most`."""
    return lambda value, word, _folder: check_int(number(value), word, least, most)


def fraction(value: Any, word: str, _folder: Path) -> float:
    """A number from 0 to 1."""
    parsed = check_guidance(number(value))
    require(parsed <= 1, f"{parsed:g} is outside 0 to 1", word)
    return parsed


def factor(value: Any, word: str, _folder: Path) -> float:
    """A number from 0 up, as a guidance scale is; what fits is checked with the model's settings."""
    return check_guidance(number(value), word)


def side(value: Any, word: str, _folder: Path) -> int:
    """Pixels of one side; whether the model has them is checked later."""
    return check_size(number(value), word, None)


def size(value: Any, word: str, _folder: Path) -> tuple[int, int]:
    """(width, height) from 512x768 or [512, 768]."""
    parts = re.split(r"\s*[x×X*]\s*", value.strip()) if isinstance(value, str) else value
    good = isinstance(parts, Sequence) and len(parts) == 2
    require(good, f"expected WIDTHxHEIGHT, got {value!r:.80}", word)
    return check_size(number(parts[0]), word, None), check_size(number(parts[1]), word, None)


def seeds(value: Any, word: str, _folder: Path) -> int | tuple[int | None, ...] | None:
    """One seed, or several as a tuple, from 7, -1 (None: drawn), [1, 2], "1,2,3", "7-12"."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip().strip("[]").split(",")]
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
    parsed: list[int | None] = []
    for part in parts:
        ends = re.fullmatch(r"([0-9]{1,20})\s*-\s*([0-9]{1,20})", part) if isinstance(part, str) else None
        first, last = (int(ends[1]), int(ends[2])) if ends else (number(part),) * 2
        first, last = (check_int(end, word, -1, MAX_SEED) for end in (first, last))
        require(first <= last, f"{first} to {last} is no range", word)
        require(len(parsed) + last - first < MAX_IMAGES, f"more than {MAX_IMAGES:,} seeds", word)
        parsed += [None] if first == -1 else range(first, last + 1)
    require(len(parsed) > 0, "the list is empty", word)
    return tuple(parsed) if len(parsed) > 1 else parsed[0]


def sampler(value: Any, _word: str, _folder: Path) -> tuple[str, str | None]:
    """(sampler, the spacing that a joined label such as "DPM++ 2M Karras" names)."""
    return resolve(value)


def spacing(value: Any, _word: str, _folder: Path) -> str | None:
    """A spacing by anybody's name; None for "Automatic"."""
    return resolve_spacing(value)


def path(value: Any, word: str, folder: Path) -> str:
    """A file beside the prompt file or in the working directory."""
    good = isinstance(value, (str, os.PathLike)) and bool(os.fspath(value))
    require(good, f"expected a file, got {value!r:.80}", word)
    given = Path(os.path.expanduser(value))
    try:
        for candidate in map(spelt_alike, (folder / given, given)):
            if candidate.exists():
                return str(candidate)
    except (OSError, ValueError) as error:  # a name too long, a NUL character
        reason = getattr(error, "strerror", None) or "it cannot be"
        raise ConfigError(f"{str(given)!r:.80} is no file name ({reason})", where=word) from None
    raise ConfigError(f"{str(given)!r:.200} does not exist, neither in {folder} nor here", where=word)


def switch(value: Any, word: str, _folder: Path) -> bool:
    """True or False, from any spelling; a word without a value is true."""
    known = {"true": True, "": True, "false": False}
    found = known.get(value.strip().lower(), value) if isinstance(value, str) else value
    require(isinstance(found, bool), f"expected true or false, got {value!r:.80}", word)
    return found


def model(value: Any, word: str, folder: Path) -> str:
    """A path beside the prompt file, or whatever else Pipeline takes as a model."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    require(isinstance(value, str) and bool(value.strip()), f"expected a model, got {value!r:.80}", word)
    if value.strip() == "default":
        return "default"
    try:
        return path(value, word, folder)
    except ConfigError:
        return value.strip()


def quantization(value: Any, word: str, _folder: Path) -> str | None:
    """int8; whether its package is there is asked where the model is."""
    return check_quantization(value, installed=False)


def dtype(value: Any, word: str, _folder: Path) -> str:
    """auto, fp32, bf16 or fp16, from any spelling."""
    return check_dtype(value, word)


def name(value: Any, word: str, _folder: Path) -> str:
    """What a line calls its image; made safe for file systems later."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    require(isinstance(text, str) and bool(text.strip()), f"expected a name, got {value!r:.80}", word)
    return text.strip()


def clip_skip(value: Any, word: str, _folder: Path) -> int:
    """As A1111 counts on its lines (1: the last layer); kept as diffusers counts (0)."""
    return check_int(number(value), word, 1, 100) - 1
