"""LoRA tags in prompts, as A1111 has them: <lora:name:0.8>, and <lyco:name:0.8> for the same."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ldm.errors import ConfigError

TAG = re.compile(r"\s*<\s*(?:lora|lyco)\s*:([^<>]*)>\s*", re.IGNORECASE)
OPEN = re.compile(r"<\s*(lora|lyco)\s*:", re.IGNORECASE)
LIKE_TAG = re.compile(r"<\s*(\w[\w-]*)\s*:[^<>]*>")
HINT = "write <lora:name:0.8>"
REFUSED = {  # other networks that A1111 and its relatives write as tags
    "hypernet": "hypernetworks are not supported",
    "hypernetwork": "hypernetworks are not supported",
    "embedding": "embeddings (textual inversion) are not supported",
    "lycoris": "write <lora:name:0.8>",
    "loha": "LoHa is not supported",
    "lokr": "LoKr is not supported",
    "controlnet": "ControlNet is not supported",
    "segment": "segments are not supported",
    "wildcard": "write __name__ in a prompt file",
    "random": "write {a|b} in a prompt file",
}


@dataclass(frozen=True)
class LoraTag:
    """<lora:name:0.8>"""

    name: str
    weight: float


def has_tags(text: str) -> bool:
    """Whether a text holds a LoRA tag, closed or not."""
    return OPEN.search(text) is not None


def take_loras(prompt: str, where: str = "prompt") -> tuple[str, tuple[LoraTag, ...]]:
    """(the prompt without its LoRA tags, the tags in their order). <lora:name> has weight 1.

    Raises ConfigError for a tag that is not closed, has no name, no finite number as its weight, or different ones
    for the text encoder and the U-Net; and, by name, for tags of other networks.
    """
    if "<" not in prompt:
        return prompt, ()
    tags = tuple(_tag(match[1], where) for match in TAG.finditer(prompt))
    text = TAG.sub(" ", prompt).strip() if tags else prompt
    if has_tags(text):
        raise ConfigError("a <lora:…> tag is not closed", where=where, hint=HINT)
    for match in LIKE_TAG.finditer(text):
        if why := REFUSED.get(match[1].lower()):
            raise ConfigError(f"{match[0]!r:.80} cannot be applied: {why}", where=where, hint="leave it out")
    return text, tags


def _tag(content: str, where: str) -> LoraTag:
    name, *rest = content.split(":")
    tag = f"<lora:{content}>"
    weights = [_weight(part) for part in rest] or [1.0]
    if not name.strip() or not all(map(math.isfinite, weights)) or len(rest) > 3:
        raise ConfigError(f"{tag!r:.80} has no name or no number", where=where, hint=HINT)
    if len(set(weights)) > 1:
        what = f"{tag!r:.80} has different weights for the text encoder and the U-Net, which is not supported"
        raise ConfigError(what, where=where, hint="give one weight")
    return LoraTag(name.strip(), weights[0])


def _weight(text: str) -> float:
    """0.8, te=0.8 or unet=0.8; NaN for what is no number."""
    key, equals, value = text.rpartition("=")
    if equals and key.strip().lower() not in ("te", "unet"):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
