"""Latents and text embeddings, made once and kept on the disk by content."""

from ldm.data.cache.cache import Cache, Prepared, Wanted

__all__ = ["Cache", "Prepared", "Wanted"]
