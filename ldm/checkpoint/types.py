"""A model as one object, which this room loads, changes and saves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.schedule import Schedule
    from ldm.nn.text import TextEncoder
    from ldm.nn.unet import UNet
    from ldm.nn.vae import VAE


@dataclasses.dataclass
class Model:
    """What an image needs: three networks and their schedule. All who load it share it: never change it in place."""

    unet: UNet
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
