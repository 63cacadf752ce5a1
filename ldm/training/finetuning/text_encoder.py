"""Training a model's text encoders along with its U-Net: CLIP alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldm.config import require
from ldm.nn.text import ClipText, Conditioning, TextEncoder, XLText


def require_clip(text: TextEncoder) -> None:
    """Raise ConfigError where the text encoders of a model are none that can be trained."""
    parts = (text.first, text.second) if isinstance(text, XLText) else (text,)
    what = f"is for CLIP alone, and this model has {type(text).__name__}: leave it out"
    require(all(isinstance(part, ClipText) for part in parts), what, "text_encoder")


def encode(text: TextEncoder, captions: Sequence[str]) -> Conditioning:
    """The captions' embeddings with gradients, all in one batch; else as `text.encode`, with "" for None."""
    if not isinstance(text, XLText):
        return text.states(text.tokenize(list(captions)))
    first, second = (part.states(part.tokenize(list(captions)), 1, norm=False) for part in (text.first, text.second))
    states, pooled = torch.cat([first.states, second.states], dim=-1), second.pooled
    if text.zero_empty:
        there = states.new_tensor([bool(caption) for caption in captions])
        states, pooled = states * there[:, None, None], pooled * there[:, None]
    return Conditioning(states, pooled)
