"""The images of a fine-tuning, read and counted: which can be used, and which are held out for validation."""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ldm.config import require
from ldm.data.buckets import Size, bucket_of, cropped, resized
from ldm.data.images import MAX_FILE, read_header, read_image
from ldm.data.masks import mask_line, whole_mask
from ldm.data.sources import Sample, Source, open_source
from ldm.data.sources.walk import is_prepared
from ldm.data.transforms import draw
from ldm.errors import DataError, LdmError
from ldm.training.settings import OFF, FinetuneData

if TYPE_CHECKING:
    from PIL import Image

    from ldm.training.data.conditions import ControlFolder

FEWEST, MOST = 8, 64  # of so many different images at least one is held out; and at most so many are held out
LISTED = 6  # buckets in a line
MUCH = 0.3  # share of an image's pixels; whoever loses more is named


@dataclass(frozen=True, slots=True)
class Item:
    """What is known of an image without its pixels."""

    id: str
    digest: str  # sha256 of the file's bytes
    size: Size  # upright
    bucket: Size
    captions: tuple[str, ...]
    repeats: int  # times an epoch
    profile: str = ""  # name of the ICC profile from which its colours are converted to sRGB
    mask: str = ""  # sha256 of the file beside it, or ALPHA; "" where there is none, or masks are not asked for
    control: str = ""  # sha256 of its condition's file, where a ControlNet is trained with one

    @property
    def pixels(self) -> str:
        """What its pixels, and what is learned of them, are made from."""
        mask, control = f" under {self.mask}" if self.mask else "", f" by {self.control}" if self.control else ""
        return f"{self.digest}{' in sRGB' * bool(self.profile)}{mask}{control}"


class ImageSet:
    """The images that can be used, in the order of their source; `held_out` are digests of those never trained on."""

    def __init__(self, source: Source, items: list[Item], data: FinetuneData, cut: Callable[[str], str] | None):
        self.source, self.items, self.data, self.cut = source, items, data, cut
        self.reading = threading.Lock()  # sources remember what they read last
        self.held_out = held_out({item.digest for item in items}, data.held_out)
        self.prior: ImageSet | None = None  # of what the model is to keep
        self.control: str | ControlFolder | None = None  # what a ControlNet sees: a kind of condition, or files
        self.lost: dict[str, LdmError] = {}  # images that became unreadable after they were counted, by id

    @property
    def trained(self) -> list[int]:
        """The places of the images that are trained on, each as often as it comes in an epoch."""
        places = ((place, item) for place, item in enumerate(self.items) if item.digest not in self.held_out)
        return [place for place, item in places for _ in range(item.repeats)]

    @property
    def hash(self) -> str:
        """sha256 of everything that training sees of them: bytes, captions, repeats, and which are held out."""
        rows = [(i.pixels, i.captions, i.repeats, i.digest in self.held_out) for i in self.items]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    @property
    def lines(self) -> list[str]:
        """Counts, captions that are cut and three examples; then the buckets and the size of an epoch."""
        trained = self.trained
        held = sum(item.digest in self.held_out for item in self.items)
        profiles = Counter(item.profile for item in self.items if item.profile)
        names = ", ".join(f"{name} {count}" for name, count in profiles.most_common(3))
        converted = [f"{profiles.total()} images are converted to sRGB from {names}"] if profiles else []
        return [
            *self.source.lines(self.cut),
            *converted,
            *([mask_line([item.mask for item in self.items])] if self.data.masks else []),
            self._buckets(),
            f"{len(self.items) - held} images to train on, {held} held out; an epoch has {len(trained)} samples",
        ]

    def _buckets(self) -> str:
        """The fullest buckets, how much is cropped away, and the images that lose much of themselves."""
        counts = sorted(Counter(item.bucket for item in self.items).items(), key=lambda pair: (-pair[1], pair[0]))
        listed = ", ".join(f"{bucket.width}x{bucket.height} {count}" for bucket, count in counts[:LISTED])
        more = f", and {len(counts) - LISTED} more" if len(counts) > LISTED else ""
        shares = sorted(((cropped(item.size, self.data.buckets), item.id) for item in self.items), reverse=True)
        lost = 100 * sum(share for share, _ in shares) / len(shares)
        much = [f"{id} {100 * share:.0f} %" for share, id in shares if share > MUCH]
        most = f"; of {len(much)} images more than {100 * MUCH:.0f} %: {', '.join(much[:3])}" if much else ""
        return f"buckets: {listed}{more}; {lost:.1f} % of the pixels are cropped away{most}"

    def read(self, place: int) -> tuple[Image.Image, str]:
        """The image at a place, large enough for its bucket, and the sha256 of its file. Raises ImageError.

        Threads may read at the same time: they share the files one after the other, and decode in parallel.
        """
        item = self.items[place]
        with self.reading:
            sample = self.source[place]
            with sample.open() as file:
                content = file.read(MAX_FILE + 1)
        return _decoded(content, sample, item.size, item.bucket), hashlib.sha256(content).hexdigest()

    def require(self) -> None:
        """Raise DataError where more images or captions are unusable than the settings allow."""
        self.source.require(self.data.max_bad, self.data.allow_empty_captions)


def read_images(data: FinetuneData, cut: Callable[[str], str] | None = None) -> ImageSet:
    """Open a set, read every header and count; with `cache=off` every image, and every mask, is decoded as a check.

    `cut` gives the end of a caption that the text encoder does not see. Raises DataError, ConfigError.
    """
    require(bool(data.folder), "is needed: a folder of captioned images", "data.folder")
    if is_prepared(data.folder):
        raise DataError("holds latents for ldm train", where=data.folder, hint="give the images that it was made of")
    source = open_source(data.folder, **data.reading)
    source.require(data.max_bad, data.allow_empty_captions)  # as far as it can be checked without opening an image
    config = data.buckets

    def look(sample: Sample) -> tuple[Size, str, str, str]:
        with sample.open() as file:
            header = read_header(file, sample.where)
            file.seek(0)
            size, digest = Size(header.height, header.width), hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            content = file.read(MAX_FILE + 1) if data.cache == OFF or data.masks else b""
        if data.cache == OFF:
            _decoded(content, sample, size, bucket_of(size, config))
        return size, digest, header.profile, whole_mask(content, sample, size)[1] if data.masks else ""

    items = [
        Item(sample.id, digest, size, bucket_of(size, config), sample.captions, sample.repeats, profile, mask)
        for sample, (size, digest, profile, mask) in source.validate(
            look, desc="images" if data.cache == OFF else "headers"
        )
    ]
    images = ImageSet(source, items, data, cut)
    images.require()
    if data.masks and items and not any(item.mask for item in items):
        hint = "a mask is an alpha channel, or NAME-mask.png beside NAME.png: leave masks out, or add some"
        raise DataError("none of its images has a mask", where=data.folder, hint=hint)
    return images


def read_training_images(data: FinetuneData) -> ImageSet:
    """The images to train on. Raises DataError, ConfigError."""
    images = read_images(data)
    if not images.trained:
        raise DataError("no image is left to train on", where=data.folder)
    return images


def with_prior(images: ImageSet, folder: str) -> ImageSet:
    """`images` with those of a prior in `folder` as their `prior`. Raises DataError, ConfigError."""
    try:
        images.prior = read_images(images.data.for_prior(folder))
    except DataError as error:
        if error.hint is None or "--" not in error.hint:
            raise
        hint = "these options are for the data alone: give the images of the prior in a folder of their own"
        raise DataError(f"the prior: {error.what}", where=error.where, hint=hint) from None
    return images


def _decoded(content: bytes, sample: Sample, size: Size, bucket: Size) -> Image.Image:
    return read_image(io.BytesIO(content), sample.where, at_least=min(resized(size, bucket)))


def held_out(digests: Iterable[str], share: float) -> set[str]:
    """The images kept for validation, each chosen by its content alone, so that new images change nothing for others.

    At least one of FEWEST or more images, else none; at most MOST, and at most twice the share of them.
    """
    order = sorted({digest: draw("held out", digest) for digest in digests}.items(), key=lambda pair: pair[1])
    if len(order) < FEWEST or not share:
        return set()
    most = min(MOST, math.ceil(2 * share * len(order)))
    chosen = {digest for digest, value in order[:most] if value < share}
    return chosen or {order[0][0]}
