"""Options of diffusers' and kohya's training scripts in our words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.console import say
from ldm.errors import ConfigError
from ldm.training.finetuning.options.foreign_options import ALIASES, CURVES, IDLE, REFUSED
from ldm.training.finetuning.options.values import is_same, repeated


def in_our_words(name: str, plain: str, value: Any, where: str) -> tuple[str, Any] | None:
    """Our name of a foreign option, and its value; None where it changes nothing. Raises ConfigError.

    `plain` is its name with underscores; `where` is the file that it comes from.
    """
    if plain in REFUSED and not any(is_same(value, neutral) for neutral in REFUSED[plain][0]):
        raise ConfigError(f"{name} is not supported", where=where or None, hint=REFUSED[plain][1])
    if plain in IDLE:
        say(f"{name} changes nothing here")
    if plain in REFUSED or plain in IDLE:
        return None
    alias = ALIASES[plain]
    if alias.switch is None:
        return alias.name, (alias.values or {}).get(value, value) if _is_scalar(value) else value
    if value in (False, None):
        return None
    if value is not True:
        raise ConfigError(f"{name} is a switch, got {value!r:.80}", where=where or None)
    return alias.name, alias.switch


def with_meanings(
    settings: Mapping[str, Any], sources: Mapping[str, str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings, with what foreign options mean beside their values; `sources` names the option of each setting."""
    named = {str(name).replace("-", "_"): value for name, value in options.items()}
    schedule, settings = named.get("lr_scheduler"), dict(settings)
    curve = CURVES.get(schedule, {}) if isinstance(schedule, str) else {}
    if "warmup" in curve and settings.get("warmup") and sources["warmup"] == "lr_warmup_steps":
        say("lr_scheduler constant has no warm-up, so lr_warmup_steps is ignored; constant_with_warmup has one")
        settings["warmup"] = 0
    if sources.get("samples") == "num_validation_images":
        settings |= repeated(settings)
    return {**curve, **settings}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool, type(None)))
