"""The pictures and captions of a fine-tuning: judged, counted, encoded once, and handed out as batches by number."""

from ldm.training.data.dataset import Batch, Dataset
from ldm.training.data.images import Pictures, read_pictures
from ldm.training.data.settings import OFF, FinetuneData

__all__ = ["OFF", "Batch", "Dataset", "FinetuneData", "Pictures", "read_pictures"]
