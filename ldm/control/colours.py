"""Colours of an image without its details: a coarse palette, a blurred one, flat regions."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

CELL, FEWEST = 64, 8  # pixels of a palette's square; squares along the longer side, at least
REGIONS = 8  # of a segmentation, at most
# Colours of regions from the largest to the smallest: far apart, and those of no single photo
REGION_COLOURS = ((0, 0, 0), (230, 60, 60), (60, 180, 75), (0, 110, 220), (255, 225, 25), (245, 130, 48))
REGION_COLOURS += ((145, 30, 180), (70, 240, 240))
SMALL = 1 / 500  # of the image: regions below are given to their neighbours


def palette(image: Image.Image) -> Image.Image:
    """Squares of the mean colour."""
    cell = max(1, min(CELL, max(image.size) // FEWEST))
    small = image.resize([max(1, round(side / cell)) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


def tile(image: Image.Image) -> Image.Image:
    """Half the size and back: colours and shapes stay, details are to be made anew."""
    small = image.resize([max(1, side // 2) for side in image.size], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def blur(image: Image.Image) -> Image.Image:
    """Blurred by a hundredth of the longer side."""
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 100))


def segmentation(image: Image.Image) -> Image.Image:
    """Regions of like colour of a flat drawing, each in a colour by its rank: black is the largest."""
    calm = image.filter(ImageFilter.MedianFilter(3))
    labels = np.asarray(calm.quantize(REGIONS, Image.Quantize.MEDIANCUT, kmeans=3, dither=Image.Dither.NONE))
    counts = np.bincount(labels.ravel(), minlength=256)
    kept = [label for label in np.argsort(-counts, kind="stable") if counts[label] >= labels.size * SMALL]
    colours = np.asarray(image, np.float64)
    means = np.stack([colours[labels == label].mean(axis=0) for label in kept])
    ranks = np.zeros(256, np.int64)
    ranks[kept] = np.arange(len(kept))
    for label in np.flatnonzero((counts > 0) & (counts < labels.size * SMALL)):
        mean = colours[labels == label].mean(axis=0)
        ranks[label] = int(np.abs(means - mean).sum(axis=1).argmin())
    return Image.fromarray(np.array(REGION_COLOURS, np.uint8)[ranks[labels]])
