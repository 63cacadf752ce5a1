"""Latents and text embeddings, made once and kept on the disk by content."""

from .cache import Cache, Prepared, Wanted

__all__ = ["Cache", "Prepared", "Wanted"]
