"""The images and captions of every stage: read and counted, encoded once, and given out as numbered batches."""

from ldm.training.data.dataset import Batch, ImageDataset, PixelBatch
from ldm.training.data.drawn import DrawnSet, read_prompts
from ldm.training.data.images import ImageSet, read_images, read_training_images
from ldm.training.data.prepared import PreparedSet
from ldm.training.data.scenes import SceneSet

__all__ = ["Batch", "DrawnSet", "ImageDataset", "ImageSet", "PixelBatch", "PreparedSet", "SceneSet"]
__all__ += ["read_images", "read_prompts", "read_training_images"]
