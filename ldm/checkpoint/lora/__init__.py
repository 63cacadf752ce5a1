"""LoRA and DoRA files: read, matched with a model, merged into a copy of it, written."""

from ldm.checkpoint.lora.apply import Match, match_layers, unapplied_line, with_loras, with_networks
from ldm.checkpoint.lora.read import LoraFile, LoraHeader, find_lora, read_lora, read_lora_header
from ldm.checkpoint.lora.target import Target, networks, target_at, target_of
from ldm.checkpoint.lora.write import write_lora, write_lora_into

__all__ = ["LoraFile", "LoraHeader", "Match", "Target", "find_lora", "match_layers", "networks", "read_lora"]
__all__ += ["read_lora_header", "target_at", "target_of", "unapplied_line", "with_loras", "with_networks"]
__all__ += ["write_lora", "write_lora_into"]
