"""What a fine-tuning can be told of its data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ldm.config import require
from ldm.data.buckets import BucketConfig
from ldm.data.transforms import TransformConfig

OFF = "off"  # in the place of the cache's folder
MAX_SIDE = 8192  # pixels


@dataclass(frozen=True)
class FinetuneData:
    """What is learned from, and how each picture and caption is taken. Raises ConfigError."""

    folder: str = ""  # a folder of any layout, a .tar, a .parquet, a set on the hub
    captions: Literal["auto", "names"] = "auto"  # names: made from the names of folders and files
    split: str = "train"
    resolution: int = 128  # pixels; a picture is resized to a bucket of at most resolution² of them
    bucket_step: int | None = None  # pixels; None: 8 up to a resolution of 256, else 64
    min_side: int | None = None  # pixels of a bucket; None: half the resolution
    max_side: int | None = None  # pixels of a bucket; None: twice the resolution
    upscale: bool = True  # False: small pictures get buckets of their own size
    square: bool = False  # the resolution's square for all pictures
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0  # probability of a mirrored picture
    max_bad: float = 0.05  # of the pictures may be unusable: a share, from 1 on a number
    allow_empty_captions: bool = False
    caption_dropout: float = 0.1  # share of the samples that are trained without their caption
    shuffle_tags: bool = False  # what stands between a caption's commas in another order each time
    keep_tags: int = 0  # of these so many stay at the beginning
    held_out: float = 0.05  # share of the pictures that is kept for validation
    cache: str | None = None  # folder of latents and text embeddings; None: RUN/cache; off: encode as needed
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # of what the cache keeps
    workers: int = 1  # threads that read pictures ahead where nothing is cached

    def __post_init__(self) -> None:
        for name in ("max_bad", "keep_tags", "workers"):
            require(getattr(self, name) >= 0, f"must not be negative, got {getattr(self, name)}", name)
        for name, most in (("caption_dropout", 1), ("held_out", 0.5)):
            value = getattr(self, name)
            require(0 <= value <= most, f"must be 0 to {most}, got {value}", name)
        for name in ("resolution", "min_side", "max_side", "bucket_step"):
            value = getattr(self, name)
            fits = value is None or 1 <= value <= MAX_SIDE
            require(fits, f"must be 1 to {MAX_SIDE} pixels, got {value}", name)
        alone = self.min_side is None and self.max_side is None
        require(alone or not self.square, "contradicts min_side and max_side", "square")
        kept = self.transform.crop == "center" or self.cache == OFF
        require(kept, "random crops cannot be kept in a cache: use crop=center, or cache=off", "crop")
        require(self.shuffle_tags or not self.keep_tags, "is for shuffle_tags alone", "keep_tags")
        assert self.buckets.sides  # raises ConfigError too

    def of_prior(self, folder: str) -> FinetuneData:
        """The same of the pictures of what must be kept, all of which are trained on, some without their caption."""
        return replace(self, folder=folder, held_out=0.0, caption_dropout=max(self.caption_dropout, 0.1))

    @property
    def buckets(self) -> BucketConfig:
        step = self.bucket_step or (8 if self.resolution <= 256 else 64)
        low, high = (self.resolution, self.resolution) if self.square else (self.min_side, self.max_side)
        return BucketConfig(self.resolution, step, low, high, self.upscale)

    @property
    def transform(self) -> TransformConfig:
        return TransformConfig(self.crop, self.flip)
