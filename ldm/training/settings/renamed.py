"""Old names of settings, and other names of their values, which are accepted too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.data.emoji import scenes
from ldm.device import SPELLINGS

RENAMED = {"bank": "latent_pool"}
RENAMED_VALUES = {("prior_target", "pictures"): "images"}
DTYPES = ("precision", "save_dtype", "cache_dtype", "data.cache_dtype")  # settings that take any spelling of a dtype


def with_new_names(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under their present names, with the present names of their values."""
    renamed = {RENAMED.get(name, name): value for name, value in mapping.items()}
    if renamed.get("stage") == "unet" and "caption_dropout" in renamed:  # which is a setting of the data
        data = dict(renamed.get("data") or {})
        renamed["data"] = {**data, "caption_dropout": renamed.pop("caption_dropout")}
    return {name: with_new_value(name, value) for name, value in renamed.items()}


def with_new_value(name: str, value: Any) -> Any:
    """The present name of a setting's value, or of the settings that it holds; of a dtype fp32, bf16 or fp16."""
    if name in ("cache", "data.cache") and value is False:
        return "off"  # as YAML reads it
    if name in DTYPES:
        return SPELLINGS.get(str(value).lower(), value)
    if name == "data" and isinstance(value, Mapping):
        return with_new_names(value)
    if name == "scenes" and isinstance(value, Mapping):
        return {scenes.RENAMED.get(option, option): setting for option, setting in value.items()}
    if name == "exclude" and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
