"""The stages of training by name: each turns its settings into a network, batches, a loss and a model folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.training.loop.loop import Stage
from ldm.training.settings import Settings

if TYPE_CHECKING:
    from ldm.training.data import ImageSet


def _autoencoder(settings: Settings, out: Path, images: ImageSet | None) -> Stage:
    from ldm.training.stages.autoencoder import Autoencoder

    return Autoencoder(settings)


def _text(settings: Settings, out: Path, images: ImageSet | None) -> Stage:
    from ldm.training.stages.text import Text

    return Text(settings)


def _unet(settings: Settings, out: Path, images: ImageSet | None) -> Stage:
    from ldm.training.stages.unet import UNetStage

    return UNetStage(settings)


def _finetune(settings: Settings, out: Path, images: ImageSet | None) -> Stage:
    from ldm.training.stages.finetune import open_finetune

    return open_finetune(settings, out, images)


Factory = Callable[[Settings, Path, "ImageSet | None"], Stage]  # the run's folder; the images of a fine-tuning
STAGES: dict[str, Factory] = {"autoencoder": _autoencoder, "text": _text, "unet": _unet, "finetune": _finetune}
