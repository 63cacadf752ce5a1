"""Old names of settings and of their values, which are still accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.data.emoji import scenes

RENAMED = {"bank": "latent_pool"}
RENAMED_VALUES = {("prior_target", "pictures"): "images"}


def with_new_names(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under their present names, with the present names of their values."""
    renamed = {RENAMED.get(name, name): value for name, value in mapping.items()}
    return {name: with_new_value(name, value) for name, value in renamed.items()}


def with_new_value(name: str, value: Any) -> Any:
    """The present name of a setting's value, or of the settings that it holds."""
    if name == "data" and isinstance(value, Mapping):
        return with_new_names(value)
    if name == "scenes" and isinstance(value, Mapping):
        return {scenes.RENAMED.get(option, option): setting for option, setting in value.items()}
    return RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
