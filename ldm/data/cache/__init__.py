"""Latents and text embeddings, made once and kept on the disk by content."""

from ldm.data.cache.cache import Cache, CachedSample, CacheReport

__all__ = ["Cache", "CacheReport", "CachedSample"]
