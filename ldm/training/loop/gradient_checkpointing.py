"""Activations that are computed twice instead of being kept."""

from __future__ import annotations

from torch import nn

from ldm.config import require
from ldm.nn.mmdit import MMDiT
from ldm.nn.unet import UNet


def checkpoint_gradients(module: nn.Module) -> None:
    """Compute activations again in the backward pass: in our networks, diffusers' and transformers' networks.

    Raises ConfigError where no part of `module` can.
    """
    found = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
    require(bool(found), f"{type(module).__name__} cannot do that", "gradient_checkpointing")
    for part in module.modules():
        if hasattr(part, "enable_gradient_checkpointing"):  # diffusers
            part.enable_gradient_checkpointing()
        elif hasattr(part, "gradient_checkpointing_enable"):  # transformers, which has a new name for it from 5 on
            enable = getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        elif isinstance(part, UNet | MMDiT):
            part.gradient_checkpointing = True
