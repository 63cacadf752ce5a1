"""LoRA tags in prompts, as A1111 has them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ldm.errors import ConfigError

TAG = re.compile(r"\s*<lora:([^<>]*)>\s*")


@dataclass(frozen=True)
class LoraTag:
    """<lora:name:0.8>"""

    name: str
    weight: float


def take_loras(prompt: str, where: str = "prompt") -> tuple[str, tuple[LoraTag, ...]]:
    """(the prompt without its LoRA tags, the tags in their order). <lora:name> has weight 1.

    Raises ConfigError for a tag that is not closed, has no name, or no single finite number as its weight.
    """
    tags = tuple(_tag(match[1], where) for match in TAG.finditer(prompt))
    text = TAG.sub(" ", prompt).strip() if tags else prompt
    if "<lora:" in text:
        raise ConfigError("a <lora:…> tag is not closed", where=where, hint="write <lora:name:0.8>")
    return text, tags


def _tag(content: str, where: str) -> LoraTag:
    name, colon, rest = content.partition(":")
    try:
        weight = float(rest) if colon else 1.0
    except ValueError:
        weight = math.nan
    if not name.strip() or not math.isfinite(weight):
        tag = f"<lora:{content}>"
        raise ConfigError(f"{tag!r:.80} has no name or no number", where=where, hint="write <lora:name:0.8>")
    return LoraTag(name.strip(), weight)
