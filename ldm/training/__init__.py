"""Training: one loop, its exact state, and the stages autoencoder, text, U-Net, fine-tuning and distillation."""

from ldm.training.command import train
from ldm.training.distilling import distill
from ldm.training.finetuning.command import finetune
from ldm.training.settings import packaged_configs, read_settings

__all__ = ["cache", "distill", "finetune", "packaged_configs", "read_settings", "train"]


def __getattr__(name: str) -> object:
    """`cache` is imported when it is asked for: it needs torch, and the command line imports this room."""
    if name == "cache":
        from ldm.training.data.prepare import cache

        return cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
