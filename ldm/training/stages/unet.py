"""Stage 3, the U-Net or a flow transformer: denoising latents under their captions' embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm import images
from ldm.checkpoint import Model
from ldm.config import build, require
from ldm.device import pick_device
from ldm.diffusion.denoiser import Predict
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import ModelError
from ldm.nn.text import ClipText, TextEncoder
from ldm.nn.unet import UNet
from ldm.training.checks import check_same
from ldm.training.data import Batch, ImageDataset, ImageSet, PreparedSet, SceneSet
from ldm.training.data.encoded import Encoders
from ldm.training.finetuning.text_encoder import encode
from ldm.training.loop import seeded
from ldm.training.loop.error_weights import ErrorWeights
from ldm.training.parts import network_config, new_network, text_parts, vae_part
from ldm.training.reports.card import unet_card
from ldm.training.settings import UNetSettings
from ldm.training.stages.common import (
    conditioned,
    decoded,
    diffusion_loss,
    draw_grid,
    fixed_samples,
    grid_captions,
    networks_of,
    square_ids,
    validation_scores,
)
from ldm.training.stages.export import save_whole
from ldm.training.stages.start import start_from

GRID = 16  # images in the sample grid


def open_stage(settings: UNetSettings, out: Path, images: ImageSet | PreparedSet | SceneSet) -> UNetStage:
    return UNetStage(settings, out, images)


class UNetStage:
    """Our U-Net or flow transformer on latents; the autoencoder is frozen, and so is the text unless it has a rate."""

    def __init__(self, settings: UNetSettings, out: Path, images: ImageSet | PreparedSet | SceneSet):
        s = self.settings = settings
        self.device = pick_device(s.device)
        self.schedule = build(Schedule, s.schedule, "schedule")
        vae, text = vae_part(s), text_parts(s)
        self.vae, self.text = vae.load().to(self.device), text.load().to(self.device)
        torch.manual_seed(seeded.key(s.seed, "unet"))
        unet = self._started() if s.init else new_network(network_config(s, vae, text))
        self.network: Callable[..., Tensor] = torch.compile(unet) if s.compile else unet
        self.module = nn.ModuleDict({"unet": unet, "text": self._trained_text()}) if s.text_rate else unet
        self.weights = None if s.weight_floor is None else ErrorWeights(s.weight_floor)
        self.tensors = self.weights.tensors if self.weights else {}
        self.xl = unet.config.takes_sizes
        if isinstance(images, ImageSet):
            images.cut = self.text.truncated
        ids = vae.fingerprint, " ".join(text.fingerprints)
        encoders = Encoders(self.vae, self.text, ids, self.device)
        self.data = ImageDataset(images, encoders, s.seed, s.batch_size, out, texts=not s.text_rate, xl=self.xl)
        self.lines, self.inputs = self.data.lines, self.data.inputs
        self.validation = fixed_samples(self.data, s.seed, self.device)
        self.captions = grid_captions(self.data, self.validation, GRID)

    def _started(self) -> UNet:
        """The U-Net of `init`. Raises ConfigError or ModelError where it is not what the settings and parts need."""
        s, module = self.settings, start_from(self.settings.init, "unet")
        check_same(s.model, dataclasses.asdict(module.config), s.init)
        have, need = module.config.in_channels, self.vae.latent_channels
        if have != need:
            raise ModelError(f"its U-Net takes {have} latent channels, the autoencoder has {need}", where=s.init)
        have, need = module.config.cross_attention_dim, self.text.width
        if have != need:
            raise ModelError(f"its U-Net takes text of width {have}, the text encoder has {need}", where=s.init)
        return module

    def _trained_text(self) -> nn.Module:
        """The text encoder's network, which is trained along."""
        is_clip = isinstance(self.text, ClipText)
        require(is_clip, f"is for CLIP alone, and this is {type(self.text).__name__}: leave it out", "text_rate")
        return self.text.model.float().requires_grad_(True)

    def _text(self, module: nn.Module) -> TextEncoder:
        """The text encoder, with the network of `module` where it is trained."""
        trained = networks_of(module).get("text")
        return self.text if trained is None else ClipText(trained, self.text.tokenizer, self.text.words)

    def batches(self, first_step: int) -> Iterator[Batch]:
        s = self.settings
        return self.data.batches(first_step, s.steps, s.accumulation)

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        s, predict = self.settings, self._predict(self.module, batch)
        more = {"contrast": s.flow_contrast, "weights": self.weights}
        return diffusion_loss(predict, self.schedule, s, batch, step, micro, **more)

    def _predict(self, module: nn.Module, batch: Batch) -> Predict:
        cond = batch.cond if batch.cond is not None else encode(self._text(module), batch.captions)
        unet = self.network if module is self.module else networks_of(module)["unet"]
        network = conditioned(unet, batch.time_ids)
        return lambda x, timesteps: network(x, timesteps, cond)

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """On held-out samples, with the same noise and noise levels every time: the loss, and the error of x0."""
        if not self.validation:
            return {}
        s, samples = self.settings, self.validation
        bound = ((self._predict(ema, batch), batch.latents, noise, u, batch.mask) for batch, noise, u in samples)
        return validation_scores(bound, self.schedule, s.snr_gamma, s.validation_levels)

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """Captions of held-out images drawn with fixed seeds; None where there are none."""
        s, side, count = self.settings, self.settings.data.resolution, len(self.captions)
        if not count:
            return None
        text, network = self._text(ema), networks_of(ema)["unet"]
        if self.xl:  # original size, crop, target size
            network = partial(network, time_ids=square_ids(side, self.device))
        cond, uncond = text.encode(self.captions), text.encode([None] * count)
        sigmas = self.schedule.sigmas(s.sample_steps, s.sampler)
        denoise = guided_denoiser(network, cond, uncond, Guidance(scale=s.guidance_scale), self.schedule, sigmas)
        shape = (self.vae.latent_channels, *[side // self.vae.factor] * 2)
        x0 = draw_grid(denoise, self.schedule, sigmas, s.sampler, shape, range(count), s.seed, self.device)
        return images.grid(images.to_pil(decoded(self.vae, x0)), columns=8)

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        unet, text = networks_of(ema)["unet"], self._text(ema)
        model = Model(unet=unet, vae=self.vae, text=text, schedule=self.schedule)
        card = partial(unet_card, self.settings, model, self.device.type, scores=scores)
        return save_whole(model, folder, torch.bfloat16, card)
