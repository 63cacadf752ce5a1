"""The stages of training by name: each turns its settings into a network, batches, a loss and a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.training.loop.loop import Stage
from ldm.training.settings import Settings

if TYPE_CHECKING:
    from ldm.training.data import Pictures


def _autoencoder(settings: Settings, out: Path, pictures: Pictures | None) -> Stage:
    from ldm.training.stages.autoencoder import Autoencoder

    return Autoencoder(settings)


def _text(settings: Settings, out: Path, pictures: Pictures | None) -> Stage:
    from ldm.training.stages.text import Text

    return Text(settings)


def _unet(settings: Settings, out: Path, pictures: Pictures | None) -> Stage:
    from ldm.training.stages.unet import UNetStage

    return UNetStage(settings)


def _finetune(settings: Settings, out: Path, pictures: Pictures | None) -> Stage:
    from ldm.training.checkpoints.state import TrainState
    from ldm.training.distributed import current
    from ldm.training.loop.loop import ask_for_space
    from ldm.training.loop.optimizers import make_optimizer
    from ldm.training.stages.finetune import Finetune

    stage = Finetune(settings, out)
    if current().first:  # before the data is encoded, which may take hours
        optimizer = make_optimizer(settings, stage.module, stage.device)
        ask_for_space(TrainState(stage.module, stage.module, optimizer), settings, out)
    return stage.open(pictures)


Factory = Callable[[Settings, Path, "Pictures | None"], Stage]  # the run's folder; what was read of its data before
STAGES: dict[str, Factory] = {"autoencoder": _autoencoder, "text": _text, "unet": _unet, "finetune": _finetune}
