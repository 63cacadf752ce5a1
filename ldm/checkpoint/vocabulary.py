"""CLIP's own vocabulary, which ships with the package: 49,408 tokens, the same in Stable Diffusion 1.x, 2.x and XL.

A single file of weights holds no tokenizer; every tool brings this one.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(__file__).with_name("clip_merges.txt.xz")
START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77  # tokens of a text, start and end included


@cache
def merges() -> tuple[tuple[str, str], ...]:
    """The 48,894 pairs of CLIP's byte pair encoding, in their order."""
    text = lzma.decompress(MERGES.read_bytes()).decode("utf-8")
    return tuple(tuple(line.split(" ")) for line in text.splitlines())


@cache
def vocabulary() -> dict[str, int]:
    """Token -> id: the 256 bytes, each as the end of a word, the merged pairs, start and end."""
    letters = _letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges()), START, END]
    return {piece: number for number, piece in enumerate(pieces)}


def _letters() -> list[str]:
    """One printable character for each byte, in the order of the vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = len([byte for byte in range(256) if byte not in printable])
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]


def clip_tokenizer(pad_token: str = END, length: int = LENGTH) -> CLIPTokenizer:
    """CLIP's tokenizer. Pads with the end token (SD 1.x and the first of XL) or "!" (SD 2.x and the second of XL)."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocabulary(), [*merges()], pad_token=pad_token, model_max_length=length)


def is_clips(tokenizer_json: str) -> bool:
    """Whether a tokenizer.json (as text) has CLIP's own vocabulary and merges."""
    model = json.loads(tokenizer_json)["model"]
    if len(model["vocab"]) != len(vocabulary()) or len(model["merges"]) != len(merges()):
        return False
    pairs = (tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"])
    return model["vocab"] == vocabulary() and all(one == other for one, other in zip(pairs, merges()))
