"""Text encoders: prompts to the one `Conditioning` that a U-Net is called with."""

from ldm.nn.text.clip import ClipText
from ldm.nn.text.conditioning import Conditioning, known_words
from ldm.nn.text.open_clip import OpenClipText
from ldm.nn.text.t5 import T5Text
from ldm.nn.text.weighting import Tokens, check_plain, cut_off, encode_weighted, tokenize
from ldm.nn.text.xl import XLText

TextEncoder = ClipText | XLText | T5Text | OpenClipText

__all__ = [
    "ClipText",
    "Conditioning",
    "OpenClipText",
    "T5Text",
    "TextEncoder",
    "Tokens",
    "XLText",
    "check_plain",
    "cut_off",
    "encode_weighted",
    "known_words",
    "tokenize",
]
