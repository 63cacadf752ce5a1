"""The settings of training runs: frozen dataclasses, one for each stage, read from YAML and KEY=VALUE."""

from ldm.training.settings.base import Settings, as_dict, flat
from ldm.training.settings.control import ControlSettings
from ldm.training.settings.distill import DistillSettings
from ldm.training.settings.finetune import KINDS, MAX_SAMPLES, FinetuneSettings, check_file_name, lora_name
from ldm.training.settings.finetune_data import OFF, DataSettings, FinetuneData
from ldm.training.settings.read import (
    FREE,
    SETTINGS,
    changed,
    packaged_configs,
    read_settings,
)
from ldm.training.settings.renamed import with_new_names, with_new_value
from ldm.training.settings.stages import PIECE, AutoencoderSettings, TextSettings, UNetSettings

__all__ = [
    "FREE",
    "KINDS",
    "MAX_SAMPLES",
    "OFF",
    "PIECE",
    "SETTINGS",
    "AutoencoderSettings",
    "ControlSettings",
    "DataSettings",
    "DistillSettings",
    "FinetuneData",
    "FinetuneSettings",
    "Settings",
    "TextSettings",
    "UNetSettings",
    "as_dict",
    "changed",
    "check_file_name",
    "flat",
    "lora_name",
    "packaged_configs",
    "read_settings",
    "with_new_names",
    "with_new_value",
]
