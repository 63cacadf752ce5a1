"""The weights that a stage begins with: those of another run or of a model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ldm.checkpoint.parts import load_unet_from, load_vae_from, model_folder
from ldm.nn.weights import load_weights
from ldm.training.checkpoints.reading import read_tensors
from ldm.training.checkpoints.state import checkpoints


def start_from(init: str | None, part: str) -> nn.Module | None:
    """The network `part` ("vae", "unet") of another run or of a model folder; None without init.

    A run's U-Net has its fp32 EMA weights; its autoencoder is the exported one, whose latents have unit variance.
    Raises ModelError where `init` is neither a run nor a model folder, or its checkpoint is of another network.
    """
    if init is None:
        return None
    module = load_vae_from(model_folder(init)).module if part == "vae" else load_unet_from(model_folder(init))
    newest = checkpoints(Path(init))[-1:]
    if newest and part == "unet":
        tensors = read_tensors(newest[0])
        average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
        if any(name.startswith("unet.") for name in average):  # beside text encoders, which were trained too
            average = {k.removeprefix("unet."): v for k, v in average.items() if k.startswith("unet.")}
        load_weights(module, average, newest[0])
    return module.float().requires_grad_(True)
