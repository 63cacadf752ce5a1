"""What a line of a prompt file may set: every tool's words for it, and the check of each value.

The words that ldm.pipeline.keywords knows are taken from there; those of prompt files alone stand here.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config import require
from ldm.diffusion.names import resolve, resolve_spacing
from ldm.errors import ConfigError, nearest
from ldm.pipeline.checks import check_guidance, check_int, check_prompts, check_size
from ldm.pipeline.keywords import ALIASES, MAX_IMAGES, MAX_STEPS, UNSUPPORTED

MAX_SEED = 2**63 - 1 - MAX_IMAGES  # image k of a line has seed + k

# kohya's letters, and words that mean something else elsewhere: -n is the number of images on the command line, and
# A1111's batch_size multiplies the images of a line.
FILE_WORDS = {
    "text": "prompt",
    "caption": "prompt",
    "n": "negative_prompt",
    "negative": "negative_prompt",
    "d": "seed",
    "seeds": "seed",
    "s": "num_inference_steps",
    "sample_steps": "num_inference_steps",
    "l": "guidance_scale",
    "ss": "sampler",
    "sample_sampler": "sampler",
    "t": "strength",
    "f": "name",
    "filename": "name",
    "file_name": "name",
    "sd_model": "model",
    "images_per_prompt": "num_images",
}
_ELSEWHERE = "belongs to the command line, not to a line"
_NO_CONTROL = "ControlNet is not supported"
_ANY = object()
# Known in other tools' files and refused: word -> (values that change nothing, what to tell whoever gives another).
REFUSED: dict[str, tuple[tuple, str]] = {
    "subseed": ((-1,), "variations by a second seed are not supported"),
    "subseed_strength": ((0,), "variations by a second seed are not supported"),
    "seed_resize_from_h": ((-1, 0), "seeds of another size are not supported"),
    "seed_resize_from_w": ((-1, 0), "seeds of another size are not supported"),
    "styles": ((), "styles are not supported; write their words into the prompt"),
    "restore_faces": ((False,), "restoring faces is not supported"),
    "tiling": ((False,), "seamless tiling is not supported"),
    "outpath_samples": ((), _ELSEWHERE),
    "outpath_grids": ((), _ELSEWHERE),
    "outdir": ((), _ELSEWHERE),
    "do_not_save_samples": ((False,), "every picture is saved"),
    "do_not_save_grid": ((False, True), ""),
    "prompt_for_display": ((_ANY,), ""),
    "g": ((), "the guidance of distilled models is not supported; l is the guidance scale"),
    "nl": ((), "a second guidance scale for the negative prompt is not supported"),
    "am": ((), "say lora with weights instead of network multipliers"),
    "cn": ((), _NO_CONTROL),
    "controlnet_image": ((), _NO_CONTROL),
    "ow": ((), "XL's original size is the picture's own"),
    "oh": ((), "XL's original size is the picture's own"),
    "ct": ((0,), "XL's crop is not supported"),
    "cl": ((0,), "XL's crop is not supported"),
}


def _number(value: Any) -> Any:
    """A text that is a number as that number, anything else as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.fullmatch(r"[-+]?[0-9]{1,30}", text):
        return int(text)
    if re.fullmatch(r"[-+]?([0-9]{1,30}\.?[0-9]{0,30}|\.[0-9]{1,30})([eE][-+]?[0-9]{1,3})?", text):
        return float(text)
    return value


def _text(value: Any, word: str, _base: Path) -> str:
    require(isinstance(value, str), f"expected a text, got {value!r:.80}", word)
    return check_prompts(value, word)[0]


def _whole(least: int, most: int) -> Callable:
    return lambda value, word, _base: check_int(_number(value), word, least, most)


def _fraction(value: Any, word: str, _base: Path) -> float:
    number = check_guidance(_number(value))
    require(number <= 1, f"{number:g} is outside 0 to 1", word)
    return number


def _guidance(value: Any, word: str, _base: Path) -> float:
    return check_guidance(_number(value))


def _side(value: Any, word: str, _base: Path) -> int:
    return check_size(_number(value), word, None)


def _size(value: Any, word: str, _base: Path) -> tuple[int, int]:
    """(width, height) from 512x768 or [512, 768]."""
    parts = re.split(r"\s*[x×X*]\s*", value.strip()) if isinstance(value, str) else value
    good = isinstance(parts, Sequence) and len(parts) == 2
    require(good, f"expected WIDTHxHEIGHT, got {value!r:.80}", word)
    return check_size(_number(parts[0]), word, None), check_size(_number(parts[1]), word, None)


def _seeds(value: Any, word: str, _base: Path) -> int | tuple[int | None, ...] | None:
    """One seed, or several as a tuple, from 7, -1 (None: drawn), [1, 2], "1,2,3", "7-12"."""
    if isinstance(value, str):
        parts = [part.strip() for part in value.strip().strip("[]").split(",")]
    else:
        parts = list(value) if isinstance(value, (list, tuple)) else [value]
    seeds: list[int | None] = []
    for part in parts:
        ends = re.fullmatch(r"([0-9]{1,20})\s*-\s*([0-9]{1,20})", part) if isinstance(part, str) else None
        first, last = (int(ends[1]), int(ends[2])) if ends else (_number(part),) * 2
        first, last = (check_int(end, word, -1, MAX_SEED) for end in (first, last))
        require(first <= last, f"{first} to {last} is no range", word)
        require(len(seeds) + last - first < MAX_IMAGES, f"more than {MAX_IMAGES:,} seeds", word)
        seeds += [None] if first == -1 else range(first, last + 1)
    require(len(seeds) > 0, "the list is empty", word)
    return tuple(seeds) if len(seeds) > 1 else seeds[0]


def _sampler(value: Any, word: str, _base: Path) -> tuple[str, str | None]:
    """(sampler, the spacing that a joined label such as "DPM++ 2M Karras" says)."""
    return resolve(value)


def _spacing(value: Any, word: str, _base: Path) -> str | None:
    return resolve_spacing(value)


def _path(value: Any, word: str, base: Path) -> str:
    """A file beside the prompt file or in the working directory."""
    require(
        isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)), f"expected a file, got {value!r:.80}", word
    )
    given = Path(os.fspath(value)).expanduser()
    try:
        for path in (base / given, given):
            if path.exists():
                return str(path)
    except (OSError, ValueError) as error:  # a name too long, a NUL character
        reason = getattr(error, "strerror", None) or "it cannot be"
        raise ConfigError(f"{str(given)!r:.80} is no file name ({reason})", where=word) from None
    raise ConfigError(f"{str(given)!r:.200} does not exist, neither in {base} nor here", where=word)


def _lora(value: Any, word: str, base: Path) -> tuple[tuple[str, float], ...]:
    """((path, weight), …) from FILE, FILE:WEIGHT, [FILE, …], [[FILE, WEIGHT], …] or {FILE: WEIGHT}."""
    if isinstance(value, Mapping):
        value = [list(item) for item in value.items()]
    pairs = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        path, weight = item if isinstance(item, (list, tuple)) and len(item) == 2 else (item, 1.0)
        name, colon, tail = path.rpartition(":") if isinstance(path, str) else ("", "", "")
        if name and colon and isinstance(_number(tail), (int, float)):
            path, weight = name, _number(tail)
        number = _number(weight)
        good = isinstance(number, (int, float)) and not isinstance(number, bool) and abs(number) <= 1000
        require(good, f"the weight {weight!r:.80} is no number within -1000 to 1000", word)
        pairs.append((_path(path, word, base), float(number)))
    require(len(pairs) > 0, "the list is empty", word)
    return tuple(pairs)


def _model(value: Any, word: str, base: Path) -> str:
    """A path beside the prompt file, or whatever else Pipeline takes as a model."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    require(isinstance(value, str) and bool(value.strip()), f"expected a model, got {value!r:.80}", word)
    if value.strip() == "default":
        return "default"
    try:
        return _path(value, word, base)
    except ConfigError:
        return value.strip()


def _name(value: Any, word: str, _base: Path) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    require(isinstance(name, str) and bool(name.strip()), f"expected a name, got {value!r:.80}", word)
    return name.strip()


def _clip_skip(value: Any, word: str, _base: Path) -> int:
    """As A1111 counts on its lines (1: the last layer); kept as diffusers counts (0)."""
    return check_int(_number(value), word, 1, 100) - 1


FIELDS: dict[str, Callable[[Any, str, Path], Any]] = {
    "prompt": _text,
    "negative_prompt": _text,
    "seed": _seeds,
    "num_images": _whole(1, MAX_IMAGES),
    "batch_size": _whole(1, MAX_IMAGES),
    "num_inference_steps": _whole(1, MAX_STEPS),
    "guidance_scale": _guidance,
    "guidance_rescale": _fraction,
    "size": _size,
    "height": _side,
    "width": _side,
    "sampler": _sampler,
    "spacing": _spacing,
    "eta": _fraction,
    "clip_skip": _clip_skip,
    "image": _path,
    "mask_image": _path,
    "strength": _fraction,
    "lora": _lora,
    "model": _model,
    "name": _name,
}
PAIRS = {"size": ("width", "height"), "sampler": ("sampler", "spacing")}  # words that set two things
_PYTHON_ONLY = ("generator",)  # of ALIASES: objects, not text
WORDS: dict[str, str] = {word: name for word, name in ALIASES.items() if name in FIELDS and word not in _PYTHON_ONLY}
WORDS |= {name: name for name in FIELDS} | FILE_WORDS
TEXTS = ("prompt", "negative_prompt")


def known_word(word: str) -> str | None:
    """The word of WORDS or REFUSED that is meant, or None: --cfg-scale, "CFG scale" and cfg_scale are one."""
    if word in WORDS:
        return word
    plain = re.sub(r"[\s-]+", "_", word.strip())
    return next((w for w in (word, plain, plain.lower()) if w in WORDS or w in REFUSED), None)


@functools.lru_cache(maxsize=1024)  # the same mistake often stands in every line
def near_word(word: str, before: str = "") -> str:
    """`did you mean '…'?`, with `before` in front of the word, or "" where nothing is near."""
    told = nearest(before + word, [before + known for known in (*WORDS, *REFUSED)])
    return told if told.startswith("did you mean") else ""


def check_words(pairs: Iterable[tuple[str, Any]], base: Path) -> dict[str, Any]:
    """The settings of a line under our names, each checked; None is "not given". Paths are looked up from `base`.

    Raises ConfigError with the word as `.where`: unknown (with the nearest), of a wrong type, out of range, given twice
    or not supported.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for given, value in pairs:
        word = known_word(given)
        if word is None:
            todo = near_word(given[:80]) or "begin its name with # to have it ignored"
            raise ConfigError(f"unknown setting {given!r:.80}", where=given[:80], todo=todo)
        if value is None:
            continue
        if word in REFUSED:
            _refuse(*REFUSED[word], value, given)
            continue
        name = WORDS[word]
        try:
            value = FIELDS[name](value, given, base)
        except ConfigError as error:  # the shared checks name our word, the line says its own
            raise ConfigError(error.what, where=given, todo=error.todo) from None
        if name in UNSUPPORTED:
            _refuse(*UNSUPPORTED[name], value, given)
            continue
        for own, item in zip(PAIRS[name], value) if name in PAIRS else ((name, value),):
            if own == "spacing" and item is None:  # "Automatic", or a label that says none
                continue
            if own == "lora":
                item = found.get(own, ()) + item
            elif own in found and found[own] != item:
                raise ConfigError(f"{said[own]} and {given} are the same setting, and both are given", where=given)
            found[own], said[own] = item, given
    return _counted(found)


def _refuse(neutral: tuple, sentence: str, value: Any, word: str) -> None:
    """Raise ConfigError unless `value` is one that changes nothing."""
    words = {"true": True, "": True, "false": False}
    plain = words.get(value.strip().lower(), _number(value)) if isinstance(value, str) else value
    alike = (item for item in neutral if isinstance(item, bool) == isinstance(plain, bool) or item is _ANY)
    if not any(item is _ANY or item == plain for item in alike):
        raise ConfigError(sentence, where=word, todo="leave it out")


def _counted(found: dict[str, Any]) -> dict[str, Any]:
    """`found` with its numbers of images made one, and in agreement with its seeds."""
    batch = found.pop("batch_size", None)
    if batch is not None:
        found["num_images"] = check_int(found.get("num_images", 1) * batch, "batch_size", 1, MAX_IMAGES)
    seeds, images = found.get("seed"), found.get("num_images")
    if isinstance(seeds, tuple) and images not in (None, len(seeds)):
        raise ConfigError(f"{len(seeds)} seeds for {images} images", where="seed")
    if "mask_image" in found and "image" not in found:
        raise ConfigError("a mask needs an image", where="mask_image")
    return found
