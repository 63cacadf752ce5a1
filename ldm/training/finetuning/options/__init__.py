"""The words that a fine-tuning takes: ours, those of diffusers' and kohya's training scripts, and the refused ones.

Imports nothing heavy, so that the command line can print the tables in its help.
"""

from ldm.training.finetuning.options.foreign_options import ALIASES, ALONE, IDLE, MANY, REFUSED, Alias
from ldm.training.finetuning.options.ldm_options import KEYS, OPTIONS, SWITCHES
from ldm.training.finetuning.options.reading import (
    assigned,
    canonical,
    flattened,
    nested,
    read_value,
    setting_of,
    table,
)

__all__ = [
    "ALIASES",
    "ALONE",
    "IDLE",
    "KEYS",
    "MANY",
    "OPTIONS",
    "REFUSED",
    "SWITCHES",
    "Alias",
    "assigned",
    "canonical",
    "flattened",
    "nested",
    "read_value",
    "setting_of",
    "table",
]
