"""Latents and text embeddings, made once and kept on the disk by content."""

from .cache import Cache, Prepared, Sample

__all__ = ["Cache", "Prepared", "Sample"]
