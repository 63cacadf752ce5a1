"""Captions that are embedded together, which is faster than one by one."""

from __future__ import annotations

from collections.abc import Sequence

from ldm.training.data.encoded import EMBEDDED, Embedding, Encoders


def embed_rows(encoders: Encoders, texts: Sequence[str]) -> dict[str, Embedding]:
    """Text -> its states (1, S, D), pooled (1, P) and mask (1, S), all embedded together; of "" none."""
    texts = list(dict.fromkeys(filter(None, texts)))
    if not texts:
        return {}
    tensors = encoders.embed(texts, together=True)
    parts = [tensors.get(name) for name in EMBEDDED]
    return {text: tuple(None if p is None else p[i : i + 1] for p in parts) for i, text in enumerate(texts)}
