"""A model as one object, which this room loads, changes and saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.schedule import Schedule
    from ldm.nn.mmdit import MMDiT
    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE


PREDICTION_TYPES = {"eps": "epsilon", "epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
PREDICTION_TYPES |= {"x": "sample", "x0": "sample", "sample": "sample"}


def check_prediction_type(value: str | None) -> str | None:
    """epsilon, v_prediction or sample (or short: eps, v, x0) as diffusers spells it. Raises ConfigError."""
    if value is not None and not (isinstance(value, str) and value in PREDICTION_TYPES):
        raise ConfigError(f"unknown prediction type {value!r:.80}", hint=nearest(str(value), PREDICTION_TYPES))
    return value and PREDICTION_TYPES[value]


@dataclasses.dataclass
class Model:
    """What an image needs: three networks and their schedule. All who load it share it: never change it in place."""

    unet: UNet | MMDiT  # the network that denoises: MMDiT for SD3 and FLUX
    vae: VAE
    text: TextEncoder
    schedule: Schedule
    name: str = ""  # as the user gave it: "default", a folder's name, a hub id
    path: Path | None = None  # the folder or file it was read from
    hash: str = ""  # one sha256 over all files it was read from; a single file's own
    info: dict[str, Any] = dataclasses.field(default_factory=dict)  # the model card's settings, what was left out

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype
