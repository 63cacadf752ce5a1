"""Text encoders: prompts to the one `Conditioning` that a network is called with."""

from ldm.nn.text.clip import ClipText
from ldm.nn.text.conditioning import Conditioning, known_words
from ldm.nn.text.flow import FlowText
from ldm.nn.text.open_clip import OpenClipText
from ldm.nn.text.t5 import T5Text
from ldm.nn.text.weighting import Tokens, check_plain, cut_off, encode_weighted, reads_with_t5, tokenize
from ldm.nn.text.xl import XLText

TextEncoder = ClipText | XLText | FlowText | T5Text | OpenClipText

__all__ = [
    "ClipText",
    "Conditioning",
    "FlowText",
    "OpenClipText",
    "T5Text",
    "TextEncoder",
    "Tokens",
    "XLText",
    "check_plain",
    "cut_off",
    "encode_weighted",
    "known_words",
    "reads_with_t5",
    "tokenize",
]
