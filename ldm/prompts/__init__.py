"""What prompts hold beside words: A1111's emphasis, BREAK, prompt editing and alternation, and LoRA tags. No torch.

`take_loras` takes a prompt's tags out; `Prompt.parse` says what is wrong with the rest and knows its text, in pieces of
one weight, at each step.
"""

from ldm.prompts.emphasis import BREAK, EMPHASIS, Piece, parse, plain_text
from ldm.prompts.lora_tags import LoraTag, has_tags, take_loras
from ldm.prompts.schedule import Prompt, Text

__all__ = ["BREAK", "EMPHASIS", "LoraTag", "Piece", "Prompt", "Text", "has_tags", "parse", "plain_text", "take_loras"]
