"""A whole model as a stage leaves it, with its card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import Model, save_model

SMALL = 100_000_000  # parameters up to which a model is written in files that git hosts take


def save_whole(
    model: Model, folder: Path, dtype: torch.dtype | str, card: Callable[[Mapping[str, nn.Module]], str]
) -> Path:
    """Write `model` into `folder`; `card` gives the text of its README.md from its networks by name."""
    modules = {"unet": model.unet, "vae": model.vae.module, "text encoder": nn.ModuleList(model.text.modules)}
    small = sum(p.numel() for module in modules.values() for p in module.parameters()) < SMALL
    return save_model(model, folder, dtype=dtype, max_shard_mb=15 if small else 5000, readme=card(modules))
