"""LoRA tags in prompts, as A1111 has them: <lora:name:0.8>, and <lyco:name:0.8> for the same.

Two weights are those of the text encoder and of the U-Net: <lora:name:0.5:0.8>, <lora:name:te=0.5:unet=0.8>.
"""

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
    "controlnet": "give controlnet and control_image (--controlnet, --control-image)",
    "segment": "segments are not supported",
    "wildcard": "write __name__ in a prompt file",
    "random": "write {a|b} in a prompt file",
}


@dataclass(frozen=True)
class LoraTag:
    """<lora:name:0.8>"""

    name: str
    weight: float
    text_weight: float | None = None  # of the text encoder, where it has its own


def has_tags(text: str) -> bool:
    """Whether a text holds a LoRA tag, closed or not."""
    return OPEN.search(text) is not None


def take_loras(prompt: str, where: str = "prompt") -> tuple[str, tuple[LoraTag, ...]]:
    """(the prompt without its LoRA tags, the tags in their order). <lora:name> has weight 1.

    Raises ConfigError for a tag that is not closed, has no name, or no finite number as a weight; and, by name, for
    tags of other networks.
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
    plain = [part for part in rest if "=" not in part]
    named = {key.strip().lower(): value for key, equals, value in (part.partition("=") for part in rest) if equals}
    if not name.strip() or len(plain) > 2 or len(rest) != len(plain) + len(named) or not named.keys() <= {"te", "unet"}:
        raise ConfigError(f"{tag!r:.80} has no name or no number", where=where, hint=HINT)
    text = _number(named.get("te", plain[0] if plain else "1"))
    unet = _number(named.get("unet", plain[1] if len(plain) > 1 else str(text)))  # as A1111: what te says, if not said
    if not math.isfinite(text) or not math.isfinite(unet):
        raise ConfigError(f"{tag!r:.80} has no name or no number", where=where, hint=HINT)
    return LoraTag(name.strip(), unet, None if text == unet else text)


def _number(text: str) -> float:
    """NaN for what is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan
