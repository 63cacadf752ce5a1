"""Training: one loop, its exact state, and the stages autoencoder, text, U-Net and fine-tuning."""

from ldm.training.command import train
from ldm.training.data.prepare import cache
from ldm.training.finetuning.command import finetune
from ldm.training.settings import packaged_configs, read_settings

__all__ = ["cache", "finetune", "packaged_configs", "read_settings", "train"]
