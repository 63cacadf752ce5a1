"""Text encoders: prompts to the one `Conditioning` that a U-Net is called with."""

from ldm.nn.text.clip import ClipText
from ldm.nn.text.conditioning import Conditioning, known_words

__all__ = ["ClipText", "Conditioning", "known_words"]
