"""The pictures and captions of a fine-tuning: judged, counted, encoded once, and handed out as batches by number.

Shapes:  B samples of a batch   C, h, w latent channels, height, width   H, W picture size
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ldm.config import require
from ldm.data.buckets import BucketConfig
from ldm.data.transforms import TransformConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ldm.nn.text import Conditioning, TextEncoder
    from ldm.nn.vae import VAE

OFF = "off"  # in the place of the cache's folder


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
    shuffle_tags: bool = False  # the parts of a caption between commas in another order each time
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
        sides = self.min_side is None and self.max_side is None
        require(sides or not self.square, "contradicts min_side and max_side", "square")
        fits = self.transform.crop == "center" or self.cache == OFF
        require(fits, "random crops cannot be kept in a cache: use crop=center, or cache=off", "crop")
        assert self.buckets.sides  # both raise ConfigError

    @property
    def buckets(self) -> BucketConfig:
        step = self.bucket_step or (8 if self.resolution <= 256 else 64)
        low, high = (self.resolution, self.resolution) if self.square else (self.min_side, self.max_side)
        return BucketConfig(self.resolution, step, low, high, self.upscale)

    @property
    def transform(self) -> TransformConfig:
        return TransformConfig(self.crop, self.flip)


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    latents: Tensor  # (B, C, h, w) fp32, scaled, on the device
    captions: list[str]  # as they are trained: one of the alternatives, "" where dropped
    cond: Conditioning | None  # their embeddings in fp32; None where the dataset was made with texts=False
    time_ids: Tensor | None  # (B, 6) fp32, XL's original size, crop and target size; None without xl
    ids: list[str]  # of the samples, for messages


class Dataset:
    """A set that was opened, judged, counted and encoded, and its batches by number.

    Everything that is wrong with the data is said before a network runs; the counts are said before the first picture
    is encoded. `ids` name the autoencoder and the text encoder (sha256 of the weights). With `texts` the batches carry
    the captions' embeddings, else the captions alone, for a text encoder that is trained. `out` is the run's folder.
    An empty caption, and one that was dropped, is embedded as None: the text of guidance's other side.
    Raises DataError, ConfigError, ResourceError, Interrupted.
    """

    lines: list[str]  # what was found, counts first; they were said already
    hash: str  # of all pictures, captions and repeats: whether a run that is resumed learns from the same

    def __init__(
        self,
        data: FinetuneData,
        vae: VAE,
        text: TextEncoder,
        ids: tuple[str, str],
        device: torch.device,
        seed: int,
        batch_size: int,
        out: Path,
        texts: bool = True,
        xl: bool = False,
    ):
        raise NotImplementedError

    def __len__(self) -> int:
        """Batches in an epoch."""
        raise NotImplementedError

    @property
    def samples(self) -> int:
        """Samples in an epoch, repeats counted."""
        raise NotImplementedError

    def batch(self, number: int) -> Batch:
        """The number-th batch since the beginning: the same whenever, and however often, it is asked for."""
        raise NotImplementedError

    def held_out(self) -> list[Batch]:
        """The pictures kept for validation, always the same: the posterior's mean, the first caption, none dropped."""
        raise NotImplementedError
