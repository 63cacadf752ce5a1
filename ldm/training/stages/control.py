"""A ControlNet for a model that stays as it is: by `ldm finetune --control` on images, by `ldm train` on drawn scenes.

Zhang et al. 2023: it begins as the model's own way down with zeros at its ends, so that the first loss is the model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import images as pictures
from ldm.checkpoint import Model
from ldm.checkpoint.controlnet import SUBFOLDER, save_controlnet
from ldm.console import say
from ldm.device import DTYPES
from ldm.diffusion.denoiser import Predict
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.prompts import plain_text
from ldm.training.data import Batch, ControlDataset, ImageSet, SceneSet
from ldm.training.finetuning.base_model import frozen_dtype, load_base
from ldm.training.reports.card import control_card
from ldm.training.settings import FinetuneSettings
from ldm.training.stages.common import decoded, draw_grid, square_ids
from ldm.training.stages.finetune import Finetune, opened


def open_stage(settings: FinetuneSettings, out: Path, images: ImageSet | SceneSet) -> Control:
    return opened(Control(settings, out), images)


class Control(Finetune):
    """The ControlNet is the module; the model's networks are frozen, and in no checkpoint."""

    dataset_type = ControlDataset
    data: ControlDataset

    def __init__(self, settings: FinetuneSettings, out: Path, model: Model | None = None):
        super().__init__(settings, out, model or load_base(settings, torch.device("cpu")))
        unet = self.model.unet.to(self.device, frozen_dtype(settings, self.device)).train()
        self.base: Callable[..., Tensor] = torch.compile(unet) if settings.compile else unet

    def open(self, images: ImageSet | SceneSet) -> Control:  # type: ignore[override]
        """Encode the images, or draw the scenes. Raises DataError."""
        super().open(images)
        prompts = list(map(plain_text, self.settings.validation_prompts))
        count = len(prompts) or self.settings.samples
        found = self.data.examples(count) if count else []
        texts = prompts or [caption for caption, _ in found]
        self.examples = list(zip(texts, itertools.cycle(condition for _, condition in found))) if found else []
        if count and not found:
            say("there is no image to draw the grid's conditions from")
        return self

    def _predict(self, module: nn.Module, batch: Batch) -> Predict:
        cond, image = batch.cond, batch.control
        assert cond is not None and image is not None
        steered = self._steered(module, image, batch.time_ids)
        return lambda x, timesteps: steered(x, timesteps, states=cond.states, mask=cond.mask, pooled=cond.pooled)

    def _steered(self, module: nn.Module, image: Tensor, time_ids: Tensor | None = None) -> Callable[..., Tensor]:
        """The frozen U-Net with the residuals of the ControlNet `module`, which sees image (N, 3, H, W) in [0, 1]."""
        net, unet = (self.network, self.base) if module is self.module else (module, self.model.unet)  # not compiled

        def network(x: Tensor, timesteps: Tensor, *, states: Tensor, **text: Tensor | None) -> Tensor:
            ids = None if time_ids is None else time_ids.expand(len(x), -1)
            residuals = net(x, timesteps, states, image=image, time_ids=ids, **text)
            return unet(x, timesteps, states, time_ids=ids, residuals=residuals, **text)

        return network

    def _plain(self, module: nn.Module) -> nn.Module:
        return module

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """The prompts drawn with fixed seeds, each beside the condition that it follows."""
        s, drawing, vae = self.settings, self.drawing, self.model.vae
        if not self.examples:
            return None
        side, schedule, sigmas = s.data.resolution, self.model.schedule, drawing.runs[0].sigmas
        shape, guidance = (vae.latent_channels, *[side // vae.factor] * 2), Guidance(scale=self.guidance_scale)
        ids = square_ids(side, self.device)[None] if self.xl else None
        shown = []
        for start in range(0, len(self.examples), s.batch_size):
            texts, conditions = zip(*self.examples[start : start + s.batch_size])
            rows, image = range(start, start + len(texts)), torch.stack(conditions).to(self.device)
            cond, uncond = self.model.text.encode(list(texts)), self.model.text.encode([""] * len(texts))
            network = self._steered(ema, image, ids)
            denoise = guided_denoiser(network, cond, uncond, guidance, schedule, sigmas)
            how = (drawing.sampler, shape, rows, s.seed, self.device, drawing.spacing)
            drawn = decoded(vae, draw_grid(denoise, schedule, sigmas, *how))
            shown += [one for pair in zip(image.cpu() * 2 - 1, drawn) for one in pair]
        return pictures.grid(pictures.to_pil(torch.stack(shown)), columns=min(len(shown), 8))

    @torch.no_grad()
    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        """Write the ControlNet into `folder`/controlnet, as diffusers has it; returns that."""
        name = self.settings.save_dtype or "bf16"
        count = sum(p.numel() for p in ema.parameters())
        card = control_card(self.settings, self.model, self.device.type, count, self.data.lines, scores)
        return save_controlnet(ema, folder / SUBFOLDER, getattr(torch, DTYPES[name]), card)
