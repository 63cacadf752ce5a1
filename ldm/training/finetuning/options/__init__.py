"""The options of a fine-tuning: ours, those of diffusers' and kohya's training scripts, and those that are refused.

Imports nothing heavy, so that the command line can print the tables in its help.
"""

from ldm.training.finetuning.options.foreign_options import (
    ALIASES,
    FOREIGN_SWITCHES,
    IDLE,
    MANY,
    REFUSED,
    alias_table,
)
from ldm.training.finetuning.options.ldm_options import KEYS, OPTIONS, SWITCHES
from ldm.training.finetuning.options.reading import (
    flatten,
    nest,
    parse_overrides,
    parse_value,
    resolve_aliases,
    setting_name,
)

__all__ = [
    "ALIASES",
    "FOREIGN_SWITCHES",
    "IDLE",
    "KEYS",
    "MANY",
    "OPTIONS",
    "REFUSED",
    "SWITCHES",
    "alias_table",
    "flatten",
    "nest",
    "parse_overrides",
    "parse_value",
    "resolve_aliases",
    "setting_name",
]
