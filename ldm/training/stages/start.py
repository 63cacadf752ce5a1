"""What a stage that makes a network from nothing begins with: another run's weights, held-out samples."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ldm.checkpoint.parts import load_unet_from, load_vae_from, model_folder
from ldm.training.checkpoints.reading import read_tensors
from ldm.training.checkpoints.state import checkpoints
from ldm.training.data.samples import Samples

SEED_OFFSET = 1_000_003  # from the seed of training samples to that of held-out ones


def start_from(init: str | None, part: str) -> nn.Module | None:
    """The network `part` ("vae", "unet") of another run or of a model folder; None without init.

    A run's U-Net has its fp32 EMA weights; its autoencoder is the exported one, whose latents have unit variance.
    Raises ModelError where `init` is neither a run nor a model folder.
    """
    if init is None:
        return None
    module = load_vae_from(model_folder(init)).module if part == "vae" else load_unet_from(model_folder(init))
    newest = checkpoints(Path(init))[-1:]
    if newest and part == "unet":
        tensors = read_tensors(newest[0])
        average = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
        average = {k.removeprefix("unet."): v for k, v in average.items() if not k.startswith("text.")}
        module.load_state_dict(average)
    return module.float().requires_grad_(True)


def distinct(samples: Samples, count: int) -> dict[str, int]:
    """caption → index of the first `count` samples whose captions differ (fewer where 50 × count hold no more)."""
    found: dict[str, int] = {}
    for index in range(50 * count):
        found.setdefault(samples.captions(index, 1)[0], index)
        if len(found) == count:
            break
    return found
