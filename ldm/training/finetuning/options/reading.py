"""What was said in anybody's words, as settings by their keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm import config
from ldm.console import say
from ldm.errors import ConfigError, nearest
from ldm.training.finetuning.options.foreign_options import ALIASES, CURVES, IDLE, REFUSED
from ldm.training.finetuning.options.ldm_options import KEYS, NULLABLE, PATHS, TEXTS
from ldm.training.settings import MAX_SAMPLES


def canonical(given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """What was said, in anybody's words, as settings by their keys ("lora_rank", "data.resolution").

    Names of settings with dots and groups ("data": {…}) are taken as they are. Raises ConfigError for an unknown word
    (with the nearest), a refused one (with what to do), and one setting that is said in two ways.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    curve: dict[str, float] = {}
    for word, value in flattened(given).items():
        if str(word).replace("-", "_") == "lr_scheduler" and _hashable(value):
            curve = CURVES.get(value, {})
        for key, own in _settled(str(word), value, where).items():
            if key in found and found[key] != own:
                raise ConfigError(f"{said[key]} and {word} are the same setting, and differ", where=where or None)
            found[key], said[key] = own, str(word)
    if "steps" in found and "epochs" in found:
        raise ConfigError("steps and epochs are both given", where=where or None, todo="say one of them")
    if "warmup" in curve and found.get("warmup") and said["warmup"].replace("-", "_") == "lr_warmup_steps":
        say("lr_scheduler constant has no warm-up, so lr_warmup_steps is left out; constant_with_warmup has one")
        found["warmup"] = 0
    if said.get("samples", "").replace("-", "_") == "num_validation_images":
        found |= _repeated(found)
    return {**curve, **found}


def _repeated(found: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' scripts draw so many pictures of each prompt."""
    count, prompts = found["samples"], found.get("validation_prompts")
    if not prompts or type(count) is not int or count < 1:
        return {}
    return {"validation_prompts": [prompt for prompt in prompts for _ in range(min(count, MAX_SAMPLES))]}


def _settled(word: str, value: Any, where: str) -> dict[str, Any]:
    """{} for a word that changes nothing, else {key: value}."""
    plain = word.replace("-", "_")
    value = str(value) if isinstance(value, os.PathLike) else value
    if plain == "stage":
        if value != "finetune":
            raise ConfigError(f"is for the stage {value!r:.80}, not finetune", where=where or word)
        return {}
    if plain in REFUSED:
        neutral, sentence = REFUSED[plain]
        if not any(_same(value, item) for item in neutral):
            raise ConfigError(f"{word} is not taken here", where=where or None, todo=sentence)
        return {}
    if plain in IDLE:
        say(f"{word} changes nothing here")
        return {}
    if plain in ALIASES:
        alias = ALIASES[plain]
        if alias.switch is not None:
            if value in (False, None):
                return {}
            if value is not True:
                raise ConfigError(f"{word} is a switch, got {value!r:.80}", where=where or None)
            return _settled(alias.word, alias.switch, where)
        known = alias.values or {}
        return _settled(alias.word, known[value] if _hashable(value) and value in known else value, where)
    key = word if word.startswith("data.") else KEYS.get(plain)
    if key is None:
        todo = nearest(plain, [*KEYS, *ALIASES])
        raise ConfigError(f"unknown setting {word!r:.80}", where=where or None, todo=todo)
    if value is None and key not in NULLABLE:
        return {}  # as if it were not said
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str):
            _check_text(text, word, plain in PATHS or key.removeprefix("data.") in PATHS)
    if plain == "prompts_file":
        return {key: _prompts(value)}
    if plain in ("validation_prompts", "report_to", "targets") and isinstance(value, str):
        none = plain == "report_to" and value in ("none", "")
        parts = [value] if plain == "validation_prompts" else [part.strip() for part in value.split(",")]
        return {key: [] if none else parts}
    return {key: SHAPES[key](value, word) if key in SHAPES else value}


def _cache(value: Any, word: str) -> Any:
    """YAML reads off as False."""
    return "off" if value is False else value


def _resolution(value: Any, word: str) -> Any:
    """kohya's 512,512 is 512."""
    sides = value.split(",") if isinstance(value, str) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return value
    one, other = (side.strip() if isinstance(side, str) else side for side in sides)
    if one != other:
        todo = "say one: each picture gets a bucket of its own shape, of about as many pixels as that square"
        raise ConfigError(f"is one number of pixels, got {value!r:.80}", where=word, todo=todo)
    return int(one) if isinstance(one, str) and one.isdecimal() and len(one) < 9 else one


def _betas(value: Any, word: str) -> Any:
    """0.9,0.99 is [0.9, 0.99]."""
    try:
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return value


SHAPES = {"data.cache": _cache, "data.resolution": _resolution, "betas": _betas}


def _same(value: Any, neutral: Any) -> bool:
    """Whether a value is the neutral one, as text too."""
    if isinstance(neutral, (bool, type(None))):
        return value is neutral or (isinstance(value, str) and value.lower() == str(neutral).lower())
    if isinstance(neutral, str) or isinstance(value, bool):
        return isinstance(value, str) and value == neutral
    try:
        return float(value) == neutral
    except (TypeError, ValueError, OverflowError):
        return False


def _check_text(text: str, word: str, path: bool) -> None:
    """Raise ConfigError for what the operating system would choke on."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError("holds half a character (a lone surrogate)", where=word) from None
    if b"\0" in raw:
        raise ConfigError("holds a NUL character", where=word)
    if path and (len(raw) > 4000 or max(map(len, raw.split(b"/"))) > 255):
        raise ConfigError(f"is too long for a path: {text[:40]!r}…", where=word)


def _hashable(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


def _prompts(path: Any) -> list[str]:
    """The prompts of a text file: one a line, without kohya's options; # begins a comment."""
    try:
        text = Path(str(path)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"cannot be read ({what})", where=f"prompts file {path}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    prompts = [prompt for line in lines if (prompt := f" {line}".partition(" --")[0].strip())]
    if any(" --" in line for line in lines):
        say(f"{path}: the options in its lines (--w, --s, …) are not used: the grid is drawn as the settings say")
    if not prompts:
        raise ConfigError("holds no prompt", where=f"prompts file {path}", todo="write one a line")
    return prompts


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.resolution": 512} as {"data": {"resolution": 512}}."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        group, dot, name = key.partition(".")
        if dot:
            found.setdefault(group, {})[name] = value
        else:
            found[key] = value
    return found


def flattened(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nested`; of a run's whole settings without the `workers` of other stages, which have no part."""
    groups = {key for key in mapping if key == "data" and isinstance(mapping[key], Mapping)}
    found = {key: value for key, value in mapping.items() if key not in groups}
    found |= {f"{group}.{name}": value for group in groups for name, value in mapping[group].items()}
    if "stage" in found and "data.workers" in found:
        found.pop("workers", None)
    return found


def setting_of(word: str) -> str:
    """The name of the setting that a word means, as `--allow-changed` needs it; an unknown one stays."""
    plain = word.replace("-", "_")
    plain = ALIASES[plain].word if plain in ALIASES else plain
    return "data" if plain.startswith("data.") or KEYS.get(plain, "").startswith("data.") else plain


def read_value(word: str, text: str) -> Any:
    """A value of the command line: text where the setting is one, else as YAML reads it. Raises ConfigError."""
    plain = word.removeprefix("data.").replace("-", "_")
    plain = ALIASES[plain].word if plain in ALIASES else plain
    if plain in TEXTS or plain in REFUSED or plain in IDLE or plain == "folder":
        return text
    return config.override({}, [f"{word.replace('.', '_')}={text}"])[word.replace(".", "_")]


def assigned(words: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE as {key: value}. Raises ConfigError for what is none, and for a key that is given twice."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r:.80} is not KEY=VALUE", todo="write for example steps=1000")
        if key in found:
            raise ConfigError(f"{key} is given twice")
        found[key] = read_value(key, text)
    return found


def table() -> str:
    """The other tools' words with ours, as --help prints them."""
    rows: dict[str, list[str]] = {}
    for theirs, alias in ALIASES.items():
        value = f" {str(alias.switch).lower()}" if alias.switch is not None else ""
        rows.setdefault(f"{alias.word}{value}", []).append(theirs)
    width = max(len(ours) for ours in rows)
    return "\n".join(f"  {ours:<{width}}  {', '.join(theirs)}" for ours, theirs in rows.items())
