"""Fine-tuning with prior preservation (Ruiz et al. 2023): in each step images of what the model is to keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from ldm.console import say
from ldm.device import pick_device
from ldm.diffusion.denoiser import Predict
from ldm.nn.lora import without_updates
from ldm.training.data import Batch, ImageSet, SceneSet
from ldm.training.data.encoded import Encoders
from ldm.training.finetuning.base_model import load_base
from ldm.training.finetuning.prior import read_prior
from ldm.training.settings import FinetuneSettings
from ldm.training.stages.finetune import Finetune, opened


def open_stage(settings: FinetuneSettings, out: Path, images: ImageSet) -> WithPrior:
    """The stage, ready to train: the prior is drawn, where that is asked for, before the model is changed."""
    model = load_base(settings, pick_device(settings.device))
    if settings.prior_images:
        images.prior = read_prior(settings, model, out)
    return opened(WithPrior(settings, out, model), images)


class WithPrior(Finetune):
    """A fine-tuning whose batches have one of the prior beside them."""

    def _encode(self, images: ImageSet | SceneSet, encoders: Encoders) -> None:
        super()._encode(images, encoders)
        assert isinstance(images, ImageSet) and images.prior is not None
        say(f"of the prior {images.prior.data.folder}:")
        self.prior = self._dataset(images.prior, encoders)
        self.lines = [*self.lines, *(f"prior: {line}" for line in self.prior.lines)]
        self.inputs["prior"] = images.prior.hash

    def batches(self, first_step: int) -> Iterator[Batch]:
        priors = self.prior.batches(first_step, self.settings.steps, self.settings.accumulation)
        return (dataclasses.replace(batch, prior=prior) for batch, prior in zip(super().batches(first_step), priors))

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        loss = super().loss(batch, step, micro)
        assert batch.prior is not None
        return loss + self.settings.prior_weight * self._loss(batch.prior, "prior ", step, micro)

    def _loss(self, batch: Batch, kind: str, step: int, micro: int, teacher: Predict | None = None) -> Tensor:
        teacher = partial(self._teacher, batch) if kind and self.settings.prior_target == "model" else None
        return super()._loss(batch, kind, step, micro, teacher)

    def _teacher(self, batch: Batch, x: Tensor, timesteps: Tensor) -> Tensor:
        """The prediction of the model without its updates."""
        with without_updates(self.module):
            return self._predict(self.module, batch)(x, timesteps)
