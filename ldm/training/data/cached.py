"""Latents and text embeddings in a cache on disk, which is filled before training.

Shapes:  C, h, w latent channels, height, width
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ldm.console import say
from ldm.data.cache import Cache, CachedSample
from ldm.data.transforms import TransformConfig, View, fixed_views
from ldm.errors import DataError
from ldm.training.data.encoded import Encoders, Memory, nothing
from ldm.training.data.images import ImageSet
from ldm.training.data.left_out import leave_out, lose
from ldm.training.data.masks import Masks
from ldm.training.distributed import RowShard, current

CENTERED = TransformConfig()  # of images that are held out: cropped in the middle, never mirrored


class Cached:
    """A cache with every entry that training needs; images that cannot be encoded are left out and counted.

    With `texts` it has the captions' embeddings too. Raises DataError, ResourceError, Interrupted.
    """

    def __init__(self, images: ImageSet, encoders: Encoders, memory: Memory, folder: Path, texts: bool):
        self.images, self.memory, self.texts = images, memory, texts
        self.mask = Masks(images, encoders.vae.factor, memory).of if images.data.masks else nothing
        wanted = []
        for item in images.items:
            held = item.digest in images.held_out
            views = fixed_views(item.size, item.bucket, CENTERED if held else images.data.transform)
            wanted.append(CachedSample(item.id, item.digest, views, item.captions[:1] if held else item.captions))
        self.cache = cache = Cache(folder, encoders.vae_id, encoders.text_id, images.data.cache_dtype)

        def fill() -> dict[str, str]:
            with cache:
                embed = encoders.embed if texts else None
                done = cache.prepare(wanted, images.read, encoders.encode, embed, partial(lose, images))
            say(f"cache: {done.kept} entries found, {done.made} made, {done.bytes / 1e6:.1f} MB in {folder}")
            return {id: str(error) for id, error in images.lost.items()}

        lost = current().on_first(fill)
        images.lost = {id: images.lost.get(id) or DataError(text) for id, text in lost.items()}
        if not current().first:
            cache.reload()
        if images.lost:
            leave_out(images, images.lost)
            say(f"{len(images.lost)} images cannot be encoded: {images.lines[1]}")

    def rows(self, views: Sequence[tuple[int, View]], part: RowShard) -> tuple[list[tuple], RowShard]:
        """(row, mean, std, mask) of this process's rows of a batch, and which rows they are.

        Mean and std are fp32 (C, h, w), the mask (1, h, w) or None.
        """
        return [(row, *self.latents(*views[row]), self.mask(*views[row])) for row in part.own or (0,)], part

    def latents(self, place: int, view: View) -> tuple[Tensor, Tensor]:
        """Mean and std. Raises DataError where the cache was damaged since it was filled."""
        digest = self.images.items[place].digest
        return self.memory.get((digest, view), lambda: self.cache.latents(digest, view))
