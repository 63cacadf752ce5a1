"""The images of what a model is to keep, beside those that it learns."""

from __future__ import annotations

from ldm.errors import DataError
from ldm.training.data.images import ImageSet, read_images


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
