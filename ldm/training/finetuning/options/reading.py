"""Options by any of their names, as settings by their keys ("lora_rank", "data.resolution")."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import ConfigError, nearest
from ldm.settings_files import parse_scalar
from ldm.training.finetuning.options.foreign_options import ALIASES, FOREIGN, IDLE, REFUSED
from ldm.training.finetuning.options.foreign_reading import in_our_words, with_meanings
from ldm.training.finetuning.options.ldm_options import KEYS, NULLABLE, PATHS, TEXTS
from ldm.training.finetuning.options.values import READERS
from ldm.training.settings import with_new_names, with_new_value


def resolve_aliases(options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Options by any of their names → settings by their keys; groups ("data": {…}) are taken apart.

    `where` is the file they come from. Raises ConfigError for an unknown name (with the nearest), a refused one (with
    what to do instead), and a setting that has two values.
    """
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}  # key of a setting -> the name that it was given by
    flat = flatten(options)
    plains = {name: str(name).replace("-", "_") for name in flat}
    for name, value in flat.items():
        plain = plains[name]
        for key, resolved in _resolve(str(name), plain, value, where).items():
            if key in settings and settings[key] != resolved:
                raise ConfigError(f"{sources[key]} and {name} are the same setting, and differ", where=where or None)
            settings[key], sources[key] = resolved, plain
    if "steps" in settings and "epochs" in settings:
        raise ConfigError("steps and epochs are both given", where=where or None, hint="give one of them")
    return settings if FOREIGN.isdisjoint(plains.values()) else with_meanings(settings, sources, flat)


def _resolve(name: str, plain: str, value: Any, where: str) -> dict[str, Any]:
    """{} for an option that changes nothing, else {key: value}; `plain` is its name with underscores."""
    value = str(value) if isinstance(value, os.PathLike) else value
    if plain == "stage" and value != "finetune":
        raise ConfigError(f"is for the stage {value!r:.80}, not finetune", where=where or name)
    if plain == "stage":
        return {}
    if plain in FOREIGN:
        ours = in_our_words(name, plain, value, where)
        return {} if ours is None else _resolve(ours[0], *ours, where)
    key = name if name.startswith("data.") else KEYS.get(plain)
    if key is None:
        raise ConfigError(f"unknown setting {name!r:.80}", where=where or None, hint=nearest(plain, [*KEYS, *ALIASES]))
    if value is None and key not in NULLABLE:
        return {}  # as if it were not given
    return {key: _checked(value, name, plain, key)}


def _checked(value: Any, name: str, plain: str, key: str) -> Any:
    """The value of a setting in the form that the settings have it. Raises ConfigError."""
    is_path = plain in PATHS or key.removeprefix("data.") in PATHS
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(text, str):
            _check_text(text, name, is_path)
    reader = None if isinstance(value, (int, float)) else READERS.get(plain.removeprefix("data."))
    return reader(value, name) if reader else with_new_value(key, value)


def _check_text(text: str, name: str, is_path: bool) -> None:
    """Raise ConfigError for text that the operating system cannot take."""
    try:
        raw = os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError("holds half a character (a lone surrogate)", where=name) from None
    if b"\0" in raw:
        raise ConfigError("holds a NUL character", where=name)
    if is_path and (len(raw) > 4000 or max(map(len, raw.split(b"/"))) > 255):
        raise ConfigError(f"is too long for a path: {text[:40]!r}…", where=name)


def nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    """{"data.resolution": 512} as {"data": {"resolution": 512}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        group, dot, name = key.partition(".")
        if dot:
            nested.setdefault(group, {})[name] = value
        else:
            nested[key] = value
    return nested


def flatten(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `nest`, with present names; of a run's settings without `workers`, which other stages use."""
    data = mapping.get("data")
    if not isinstance(data, Mapping):  # flat already, as options are
        return dict(mapping)
    flat = with_new_names({key: value for key, value in mapping.items() if key != "data"})
    flat |= {f"data.{name}": value for name, value in data.items()}
    if flat.get("stage") == "finetune" and "data.workers" in flat:
        flat.pop("workers", None)
    return flat


def setting_name(option: str) -> str:
    """The name of the setting that an option gives, as `--allow-changed` needs it; an unknown one is returned."""
    plain = option.replace("-", "_")
    plain = ALIASES[plain].name if plain in ALIASES else plain
    return "data" if plain.startswith("data.") or KEYS.get(plain, "").startswith("data.") else plain


def parse_value(option: str, text: str) -> Any:
    """A value of the command line: text where the setting is one, else as YAML reads it. Raises ConfigError."""
    plain = option.removeprefix("data.").replace("-", "_")
    plain = ALIASES[plain].name if plain in ALIASES else plain
    if plain in TEXTS or plain in REFUSED or plain in IDLE or plain == "folder":
        return text
    if re.fullmatch(r"0|[1-9]\d{0,17}", text, re.ASCII):  # as YAML reads it, which takes a while to import
        return int(text)
    return parse_scalar(text, option)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE as {key: value}. Raises ConfigError for anything else, and for a key that is given twice."""
    parsed: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r:.80} is not KEY=VALUE", hint="write for example steps=1000")
        if key in parsed:
            raise ConfigError(f"{key} is given twice")
        parsed[key] = parse_value(key, text)
    return parsed
