"""Options by any of their names, as settings by their keys ("lora_rank", "data.resolution")."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.console import say
from ldm.errors import ConfigError, nearest
from ldm.settings_files import parse_scalar
from ldm.training.finetuning.options.foreign_options import ALIASES, CURVES, IDLE, REFUSED
from ldm.training.finetuning.options.ldm_options import KEYS, NULLABLE, PATHS, TEXTS
from ldm.training.finetuning.options.values import READERS, is_same, repeated
from ldm.training.settings import with_new_names, with_new_value


def resolve_aliases(options: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Options by any of their names → settings by their keys; groups ("data": {…}) are taken apart.

    `where` is the file they come from. Raises ConfigError for an unknown name (with the nearest), a refused one (with
    what to do instead), and a setting that has two values.
    """
    settings: dict[str, Any] = {}
    sources: dict[str, str] = {}  # key of a setting -> the name that it was given by
    curve: dict[str, float] = {}
    for name, value in flatten(options).items():
        plain = str(name).replace("-", "_")
        if plain == "lr_scheduler" and _is_scalar(value):
            curve = CURVES.get(value, {})
        for key, resolved in _resolve(str(name), plain, value, where).items():
            if key in settings and settings[key] != resolved:
                raise ConfigError(f"{sources[key]} and {name} are the same setting, and differ", where=where or None)
            settings[key], sources[key] = resolved, plain
    if "steps" in settings and "epochs" in settings:
        raise ConfigError("steps and epochs are both given", where=where or None, hint="give one of them")
    if "warmup" in curve and settings.get("warmup") and sources["warmup"] == "lr_warmup_steps":
        say("lr_scheduler constant has no warm-up, so lr_warmup_steps is ignored; constant_with_warmup has one")
        settings["warmup"] = 0
    if sources.get("samples") == "num_validation_images":
        settings |= repeated(settings)
    return {**curve, **settings}


def _resolve(name: str, plain: str, value: Any, where: str) -> dict[str, Any]:
    """{} for an option that changes nothing, else {key: value}; `plain` is its name with underscores."""
    value = str(value) if isinstance(value, os.PathLike) else value
    if plain == "stage" and value != "finetune":
        raise ConfigError(f"is for the stage {value!r:.80}, not finetune", where=where or name)
    if plain in REFUSED and not any(is_same(value, neutral) for neutral in REFUSED[plain][0]):
        raise ConfigError(f"{name} is not supported", where=where or None, hint=REFUSED[plain][1])
    if plain in IDLE:
        say(f"{name} changes nothing here")
    if plain in REFUSED or plain in IDLE or plain == "stage":
        return {}
    if plain in ALIASES:
        alias = ALIASES[plain]
        if alias.switch is None:
            value = (alias.values or {}).get(value, value) if _is_scalar(value) else value
            return _resolve(alias.name, alias.name, value, where)
        if value in (False, None):
            return {}
        if value is not True:
            raise ConfigError(f"{name} is a switch, got {value!r:.80}", where=where or None)
        return _resolve(alias.name, alias.name, alias.switch, where)
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


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))


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
    if not isinstance(data, Mapping):
        return with_new_names(mapping)
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
