"""The stages of training by name: each turns its settings into a network, batches, a loss and a model folder."""

from __future__ import annotations

from collections.abc import Callable

from ldm.training.loop import Stage
from ldm.training.settings import Settings


def _autoencoder(settings: Settings) -> Stage:
    from ldm.training.stages.autoencoder import Autoencoder

    return Autoencoder(settings)


def _text(settings: Settings) -> Stage:
    from ldm.training.stages.text import Text

    return Text(settings)


def _unet(settings: Settings) -> Stage:
    from ldm.training.stages.unet import UNetStage

    return UNetStage(settings)


STAGES: dict[str, Callable[[Settings], Stage]] = {"autoencoder": _autoencoder, "text": _text, "unet": _unet}
