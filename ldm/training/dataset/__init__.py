"""The pictures and captions of a fine-tuning: judged, counted, encoded once, and handed out as batches by number."""

from .dataset import Batch, Dataset
from .pictures import Pictures, read_pictures
from .settings import OFF, FinetuneData

__all__ = ["OFF", "Batch", "Dataset", "FinetuneData", "Pictures", "read_pictures"]
