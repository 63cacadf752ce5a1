"""The images and captions of a fine-tuning: read and counted, encoded once, and given out as numbered batches."""

from ldm.training.data.dataset import Batch, LatentDataset
from ldm.training.data.images import ImageSet, read_images, read_training_images

__all__ = ["Batch", "ImageSet", "LatentDataset", "read_images", "read_training_images"]
