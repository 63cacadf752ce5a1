"""LoRA and DoRA files: read, checked against a model, merged into a copy of it, written."""

from ldm.checkpoint.lora.apply import (
    Fit,
    Target,
    fit,
    networks,
    target_at,
    target_of,
    unapplied_line,
    with_loras,
    with_networks,
)
from ldm.checkpoint.lora.read import LoraFile, LoraHeader, find_lora, read_lora, read_lora_header
from ldm.checkpoint.lora.write import write_lora, write_lora_into

__all__ = [
    "Fit",
    "LoraFile",
    "LoraHeader",
    "Target",
    "find_lora",
    "fit",
    "networks",
    "read_lora",
    "read_lora_header",
    "target_at",
    "target_of",
    "unapplied_line",
    "with_loras",
    "with_networks",
    "write_lora",
    "write_lora_into",
]
