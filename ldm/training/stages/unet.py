"""Stage 3, the U-Net: denoising the pool's latents under their captions' embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm import images
from ldm.checkpoint import Model, save_model
from ldm.checkpoint.parts import load_text_from, load_vae_from
from ldm.config import build, require
from ldm.device import pick_device
from ldm.diffusion.denoiser import Predict, training_loss
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import ModelError
from ldm.nn.text import ClipText, Conditioning, TextEncoder
from ldm.nn.unet import UNet, UNetConfig
from ldm.training.checks import check_same, model_folder
from ldm.training.data.latent_pool import LatentPool, encode_images
from ldm.training.data.samples import open_samples
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.reports.card import unet_card
from ldm.training.settings import UNetSettings
from ldm.training.stages.common import (
    draw_grid,
    fixed_levels,
    networks_of,
    shape_timesteps,
    timesteps_at,
    validation_scores,
)
from ldm.training.stages.start import SEED_OFFSET, distinct, start_from

GRID = 16  # images in the sample grid


class PoolBatch(NamedTuple):
    """Rows of a batch."""

    latents: Tensor  # (B, C, h, w)
    texts: Tensor  # as `_encode` packs them
    part: RowShard


def open_stage(settings: UNetSettings, out: Path, images: object) -> UNetStage:
    return UNetStage(settings)


class UNetStage:
    """Our U-Net on cached latents; the autoencoder is frozen, and so is the text encoder unless it has a rate."""

    def __init__(self, settings: UNetSettings):
        s = self.settings = settings
        self.device = pick_device(s.device)
        self.schedule = build(Schedule, s.schedule, "schedule")
        self.vae, self.text = load_vae_from(model_folder(s.vae)), load_text_from(model_folder(s.text))
        self.vae.module.to(self.device)
        self.text.to(self.device)
        torch.manual_seed(seeded.key(s.seed, "unet"))
        unet = self._started() if s.init else UNet(self._config())
        self.network: Callable[..., Tensor] = torch.compile(unet) if s.compile else unet
        self.module = nn.ModuleDict({"unet": unet, "text": self._trained_text()}) if s.text_rate else unet
        self.samples = open_samples(s.data, s.seed)
        self.empty = self._encode([""])
        self._hold_out()

    def _config(self) -> UNetConfig:
        channels = {"in_channels": self.vae.latent_channels, "out_channels": self.vae.latent_channels}
        size = {"sample_size": self.settings.data.resolution // self.vae.factor}
        width = {"cross_attention_dim": self.text.width}
        return build(UNetConfig, {**channels, **size, **width, **self.settings.model}, "model")

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

    def _hold_out(self) -> None:
        """Fixed latents, texts, noise and stratified timesteps for the validation loss, captions for the grid."""
        s = self.settings
        held_out = open_samples(s.data, s.seed + SEED_OFFSET, held_out=True)
        found = distinct(held_out, s.validation)
        held_out_images = torch.stack([torch.from_numpy(held_out[i][0]) for i in found.values()])
        x0 = self._latents(held_out_images)
        noise = seeded.normal(tuple(x0.shape), s.seed, "validation").to(self.device)
        self.validation = (x0, noise, fixed_levels(len(x0), s.seed), self._encode(list(found)))
        self.grid_captions = list(found)[:GRID]

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> Tensor:
        """What the pool keeps of captions: the text encoder's states (B, S, D), or (B, S, D + 1) with their mask last.

        Where it is trained along, token ids (B, S).
        """
        if self.settings.text_rate:
            return self.text.tokenize(captions).to(self.device)
        found = self.text.encode_together(captions)
        if found.mask is None:
            return found.states
        return torch.cat([found.states, found.mask[..., None].to(found.states.dtype)], dim=-1)

    def _conditioning(self, module: nn.Module, packed: Tensor) -> Conditioning:
        """The states of what `_encode` packed, by the text encoder of `module` where it is trained."""
        if self.settings.text_rate:
            return Conditioning(self._text(module).states(packed).states)
        width = self.text.width
        mask = packed[..., width].bool() if packed.shape[-1] > width else None
        return Conditioning(packed[..., :width], None, mask)

    def _text(self, module: nn.Module) -> TextEncoder:
        """The text encoder, with the network of `module` where it is trained."""
        trained = networks_of(module).get("text")
        return self.text if trained is None else ClipText(trained, self.text.tokenizer, self.text.words)

    def _latents(self, images: Tensor) -> Tensor:
        return encode_images(self.vae, images, self.device)

    def batches(self, first_step: int) -> Iterator[PoolBatch]:
        s, part = self.settings, current().part(self.settings.batch_size)
        pool = LatentPool(self.samples, self._latents, self._encode, s.latent_pool, s.renew, s.workers, first_step)
        for number in range(first_step * s.accumulation, s.steps * s.accumulation):
            step, micro = divmod(number, s.accumulation)
            rows = part.of(seeded.integers(s.latent_pool, (s.batch_size,), s.seed, "rows", step, micro))
            pool.at(step)
            yield PoolBatch(pool.latents[rows], pool.texts[rows], part)

    def loss(self, batch: PoolBatch, step: int, micro: int) -> Tensor:
        s, (x0, texts, part) = self.settings, batch
        size = part.size
        noise = seeded.normal((size, *x0.shape[1:]), s.seed, "noise", step, micro)
        u = seeded.uniform((2, size), s.seed, "timesteps", step, micro)
        even = shape_timesteps(
            (torch.arange(size) + u[0]) / size, s.timesteps, s.timestep_shift
        )  # one from each of B equal parts
        timesteps = timesteps_at(self.schedule, part.of(even)).to(self.device)
        dropped = part.of(u[1] < s.caption_dropout).to(self.device).view(-1, *[1] * (texts.ndim - 1))
        predict = self._predict(self.module, torch.where(dropped, self.empty, texts))
        noise = part.of(noise).to(self.device)
        return part.mean(training_loss(predict, self.schedule, x0, noise, timesteps, s.snr_gamma))

    def _predict(self, module: nn.Module, texts: Tensor) -> Predict:
        cond = self._conditioning(module, texts)
        network = self.network if module is self.module else networks_of(module)["unet"]
        return lambda x, t: network(x, t, cond.states, mask=cond.mask)

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """On held-out samples, with the same noise and noise levels every time: the loss, and the error of x0."""
        parts = zip(*(tensor.split(32) for tensor in self.validation))
        bound = ((self._predict(ema, texts), x0, noise, u) for x0, noise, u, texts in parts)
        return validation_scores(bound, self.schedule, self.settings.snr_gamma)

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """Sixteen held-out captions rendered with fixed seeds."""
        s, captions = self.settings, self.grid_captions
        texts = self._encode(captions)
        cond, uncond = self._conditioning(ema, texts), self._conditioning(ema, self.empty.expand_as(texts))
        shape, rows = tuple(self.validation[0].shape[1:]), range(len(captions))
        sigmas = self.schedule.sigmas(s.sample_steps, s.sampler)
        guidance = Guidance(scale=s.guidance_scale)
        denoise = guided_denoiser(networks_of(ema)["unet"], cond, uncond, guidance, self.schedule, sigmas)
        x0 = draw_grid(denoise, self.schedule, sigmas, s.sampler, shape, rows, s.seed, self.device)
        return images.grid(images.to_pil(self.vae.decode(x0).cpu()), columns=8)

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        unet, text = networks_of(ema)["unet"], self._text(ema)
        model = Model(unet=unet, vae=self.vae, text=text, schedule=self.schedule)
        modules = {"unet": unet, "vae": self.vae.module, "text encoder": nn.ModuleList(text.modules)}
        card = unet_card(self.settings, self.device.type, modules, scores)
        return save_model(model, folder, dtype=torch.bfloat16, readme=card)
