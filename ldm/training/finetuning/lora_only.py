"""Where all weights of a network are trained, or a ControlNet: settings that are for LoRA alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError

# Settings of a LoRA, and their values in the settings.json of every run, which say nothing with train=full.
LORA_ONLY = {"lora_rank": (None, 16), "lora_alpha": (None,), "targets": (None, ["attention"]), "init": (None,)}


def check_lora_only(given: Mapping[str, Any], from_file: Mapping[str, Any], other: str) -> None:
    """Raise ConfigError for settings of a LoRA where all weights are trained, or a ControlNet."""
    trains = "trains all weights" if other == "train=full" else "trains a ControlNet"
    for name, usual in LORA_ONLY.items():
        if given.get(name) is not None or from_file.get(name) not in usual:
            what = f"{name} is for LoRA, and {other} {trains}"
            raise ConfigError(what, hint="leave one of them out")
