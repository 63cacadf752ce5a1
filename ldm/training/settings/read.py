"""Settings read from YAML and KEY=VALUE, and compared with those of the run that is resumed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import build
from ldm.errors import ConfigError, nearest
from ldm.settings_files import load, override
from ldm.training.settings.base import Settings, as_dict
from ldm.training.settings.control import ControlSettings
from ldm.training.settings.distill import DistillSettings
from ldm.training.settings.finetune import FinetuneSettings
from ldm.training.settings.renamed import with_new_names
from ldm.training.settings.stages import AutoencoderSettings, TextSettings, UNetSettings

SETTINGS: dict[str, type[Settings]] = {"autoencoder": AutoencoderSettings, "text": TextSettings, "unet": UNetSettings}
SETTINGS |= {"finetune": FinetuneSettings, "distill": DistillSettings, "control": ControlSettings}
# Settings that may differ between a run and its continuation without --allow-changed.
FREE = {"steps", "learning_rate", "lr_schedule", "warmup", "decay_from", "final_lr", "workers", "device"}
FREE |= {"gradient_checkpointing", "report_to", "save_every", "validate_every", "log_every", "keep"}
FREE |= {"attention", "validation_prompts", "samples", "sampler", "sample_steps", "guidance_scale"}  # of fine-tuning
FREE |= {"export", "save_dtype", "name"}
FREE_DATA = {"cache", "max_bad", "workers"}  # the same, within `data`
PATHS = {
    "model",
    "vae",
    "text",
    "text_2",
    "init",
    "prior",
    "control",
    "control_init",
    "text_encoders",
}  # equal if at one place


def packaged_configs() -> Path:
    """The folder of the shipped settings: `configs/` of the checkout, or its copy in the wheel."""
    from ldm.checkpoint import shipped

    return shipped("configs")


def read_settings(source: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a packaged name (`emoji/unet`) or a file, with KEY=VALUE `overrides` on top.

    Raises ConfigError for an unknown name, stage, key or value.
    """
    path = Path(source)
    if not path.suffix:
        folder = packaged_configs()
        names = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
        if str(source) not in names:
            raise ConfigError(f"no packaged settings {str(source)!r}", where="config", hint=nearest(str(source), names))
        path = names[str(source)]
    overrides = [f"data.folder={word[5:]}" if word.startswith("data=") else word for word in overrides]
    mapping = with_new_names(override(load(path), overrides))
    stage = mapping.get("stage")
    if stage not in SETTINGS:
        raise ConfigError(f"unknown stage {stage!r}", where=f"{path}: stage", hint=nearest(str(stage), SETTINGS))
    try:
        return build(SETTINGS[stage], mapping)
    except ConfigError as error:
        raise ConfigError(str(error), where=path) from None


def changed(old: dict[str, Any], new: Settings) -> dict[str, tuple[Any, Any]]:
    """The settings that a continuation would change and that influence what is trained: name → (old, new)."""
    after, before = as_dict(new), {**_defaults(type(new)), **with_new_names(old)}
    found = {k: (before.get(k), v) for k, v in after.items() if k not in FREE and before.get(k) != v}
    found = {k: pair for k, pair in found.items() if k not in PATHS or not _same_place(*pair)}
    if "data" in found and all(isinstance(data, dict) for data in found["data"]):
        one, other = ({k: v for k, v in data.items() if k not in FREE_DATA} for data in found.pop("data"))
        differing = [k for k, v in other.items() if one.get(k, v) != v]
        differing = [k for k in differing if k != "folder" or not _same_place(one[k], other[k])]
        found |= {"data": tuple({k: data.get(k) for k in differing} for data in (one, other))} if differing else {}
    return found


def _same_place(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_place, one, other))
    return isinstance(one, str) and isinstance(other, str) and os.path.realpath(one) == os.path.realpath(other)


def _defaults(kind: type[Settings]) -> dict[str, Any]:
    """The default of each setting, as JSON has it: its value in runs that are older than the setting."""
    found = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
