"""What prompts hold beside words: A1111's emphasis, BREAK, prompt editing and alternation, and LoRA tags. No torch.

A prompt goes through here in this order: `take_loras` takes its tags out, `check` says what is wrong with it before any
work, `at_steps` gives its text at each step, and `parse` the weights in such a text.
"""

from ldm.prompts.emphasis import BREAK, EMPHASIS, Piece, parse
from ldm.prompts.lora_tags import LoraTag, take_loras
from ldm.prompts.schedule import at_steps, check

__all__ = ["BREAK", "EMPHASIS", "LoraTag", "Piece", "at_steps", "check", "parse", "take_loras"]
