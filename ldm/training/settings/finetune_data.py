"""The settings of the data of every stage: which images, and how each image and caption is used."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ldm.config import require
from ldm.data.buckets import BucketConfig
from ldm.data.sources import Layout
from ldm.data.transforms import TransformConfig

OFF = "off"  # as the cache's folder: nothing is cached
MAX_SIDE = 8192  # pixels
FINE_STEP, FINE_UP_TO = 8, 256  # pixels: the step of buckets up to this resolution


@dataclass(frozen=True)
class FinetuneData:
    """Which images are trained on, and how each image and caption is used. Raises ConfigError."""

    folder: str = ""  # a folder of any layout, a .tar, a .parquet, a set on the hub
    captions: Literal["auto", "names", "whole"] = (
        "auto"  # names: made from the names of folders and files; whole: files
    )
    split: str | None = None  # None: train, where nearly all is in splits; all: everything
    layout: Layout = "auto"  # of a folder that can be read in several ways
    exclude: tuple[str, ...] = ()  # patterns of files that are left out
    resolution: int = 128  # pixels; an image is resized to a bucket of at most resolution² of them
    bucket_step: int | None = None  # pixels; None: 8 up to a resolution of 256, else 64
    min_side: int | None = None  # pixels of a bucket; None: half the resolution
    max_side: int | None = None  # pixels of a bucket; None: twice the resolution
    upscale: bool = True  # False: small images get buckets of their own size
    square: bool = False  # all images are cropped to resolution × resolution
    crop: Literal["center", "random"] = "center"
    flip: float = 0.0  # probability of a mirrored image
    max_bad: float = 0.05  # images that may be unusable: a share below 1, a number from 1 on
    allow_empty_captions: bool = False
    caption_dropout: float = 0.1  # share of the samples that are trained without their caption
    masks: bool = False  # learn of each image what its alpha channel, or NAME-mask.png beside it, shows
    shuffle_tags: bool = False  # shuffle the comma-separated parts of a caption each time
    keep_tags: int = 0  # of these so many stay at the beginning
    held_out: float = 0.05  # share of the images that is kept for validation
    cache: str | None = None  # folder of latents and text embeddings; None: RUN/cache; off: encode as needed
    cache_dtype: Literal["fp32", "bf16"] = "fp32"  # of what the cache keeps
    workers: int = 1  # threads that read images ahead where nothing is cached

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
        without_sides = self.min_side is None and self.max_side is None
        require(without_sides or not self.square, "contradicts min_side and max_side", "square")
        fixed = self.transform.crop == "center" or self.cache == OFF
        require(fixed, "random crops cannot be cached: use crop=center, or cache=off", "crop")
        require(self.shuffle_tags or not self.keep_tags, "needs shuffle_tags", "keep_tags")
        assert self.buckets.sides  # raises ConfigError too

    def for_prior(self, folder: str) -> FinetuneData:
        """The settings for the prior's images in `folder`: all are trained on, at least a tenth without captions."""
        own = {"folder": folder, "layout": "auto", "exclude": (), "split": None, "masks": False}
        return replace(self, **own, held_out=0.0, caption_dropout=max(self.caption_dropout, 0.1))

    @property
    def reading(self) -> dict[str, Any]:
        """The options of `ldm.data.sources.open_source`."""
        return {name: getattr(self, name) for name in ("captions", "split", "layout", "exclude")}

    @property
    def buckets(self) -> BucketConfig:
        step = self.bucket_step or (FINE_STEP if self.resolution <= FINE_UP_TO else 64)
        low, high = (self.resolution, self.resolution) if self.square else (self.min_side, self.max_side)
        return BucketConfig(self.resolution, step, low, high, self.upscale)

    @property
    def transform(self) -> TransformConfig:
        return TransformConfig(self.crop, self.flip)


@dataclass(frozen=True)
class DataSettings(FinetuneData):
    """The data of a stage that trains from nothing: images as a fine-tuning has them, or drawn scenes."""

    folder: str | None = None  # type: ignore[assignment]  # None: emoji scenes, drawn as needed
    font: str | None = None  # NotoColorEmoji.ttf; None: where the package fonts-noto-color-emoji puts it
    scenes: dict[str, Any] = field(default_factory=dict)  # fields of ldm.data.emoji.SceneConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.folder) or not self.masks, "is for images: give data=FOLDER too", "masks")
