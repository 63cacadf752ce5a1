"""A set of captioned images as arrays: what a training sees of it, in a few lines."""

import numpy as np
from PIL import Image, ImageOps

from ldm.data.sources import open_source


class CaptionedFolder:
    """`folder[i]` is (uint8 (resolution, resolution, 3), first caption); raises DataError for the first bad one."""

    def __init__(self, path, resolution=128, **options):
        self.source, self.resolution = open_source(path, **options), resolution
        self.source.require(max_bad=0)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample, size = self.source[index], (self.resolution, self.resolution)
        square = ImageOps.fit(sample.image(at_least=self.resolution), size, Image.Resampling.LANCZOS)
        return np.array(square), sample.captions[0]
