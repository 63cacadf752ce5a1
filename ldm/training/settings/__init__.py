"""What a training run can be told: frozen dataclasses, one a stage, read from YAML and KEY=VALUE."""

from ldm.training.settings.base import DataSettings, Settings
from ldm.training.settings.finetune import KINDS, MAX_SAMPLES, FinetuneSettings, check_file_name
from ldm.training.settings.read import FREE, SETTINGS, as_dict, changed, packaged_configs, read_settings
from ldm.training.settings.stages import PIECE, AutoencoderSettings, TextSettings, UNetSettings

__all__ = [
    "FREE",
    "KINDS",
    "MAX_SAMPLES",
    "PIECE",
    "SETTINGS",
    "AutoencoderSettings",
    "DataSettings",
    "FinetuneSettings",
    "Settings",
    "TextSettings",
    "UNetSettings",
    "as_dict",
    "changed",
    "check_file_name",
    "packaged_configs",
    "read_settings",
]
