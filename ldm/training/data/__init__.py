"""The images and captions of every stage: read and counted, encoded once, and given out as numbered batches."""

from ldm.training.data.dataset import Batch, ImageDataset
from ldm.training.data.drawn import DrawnSet, read_prompts
from ldm.training.data.images import ImageSet, read_images, read_training_images
from ldm.training.data.kinds import ControlDataset, PixelBatch, PixelDataset
from ldm.training.data.prepared import PreparedSet
from ldm.training.data.scenes import SceneSet

__all__ = ["Batch", "ControlDataset", "DrawnSet", "ImageDataset", "ImageSet", "PixelBatch", "PixelDataset"]
__all__ += ["PreparedSet", "SceneSet", "read_images", "read_prompts", "read_training_images"]
