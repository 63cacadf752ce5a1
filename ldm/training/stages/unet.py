"""Stage 3, the U-Net: denoising the pool's latents under their captions' embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm import images
from ldm.checkpoint import Model, save_model
from ldm.config import build, require
from ldm.data.cache.prepared import is_prepared
from ldm.device import pick_device
from ldm.diffusion.denoiser import Predict, training_loss
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.diffusion.schedule import Schedule
from ldm.errors import ModelError
from ldm.nn.text import ClipText, Conditioning, TextEncoder, XLText
from ldm.nn.unet import UNet
from ldm.training.checks import check_same
from ldm.training.data import Batch
from ldm.training.data.encoded import Encoders
from ldm.training.data.latent_pool import LatentPool, encode_images
from ldm.training.data.prepared import PreparedDataset
from ldm.training.data.samples import open_samples
from ldm.training.distributed import RowShard, current
from ldm.training.loop import seeded
from ldm.training.loop.error_weights import ErrorWeights
from ldm.training.parts import text_parts, unet_config, vae_part
from ldm.training.reports.card import unet_card
from ldm.training.settings import UNetSettings
from ldm.training.stages.common import (
    SMALL,
    conditioned,
    draw_grid,
    fixed_levels,
    networks_of,
    shape_timesteps,
    timesteps_at,
    validation_scores,
)
from ldm.training.stages.start import SEED_OFFSET, distinct, start_from

GRID = 16  # images in the sample grid
Held = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # latents, noise, noise levels, packed texts, time_ids


class PoolBatch(NamedTuple):
    """Rows of a batch."""

    latents: Tensor  # (B, C, h, w)
    texts: Tensor  # (B, N), as `_encode` packs them
    part: RowShard
    samples: Sequence[str]  # captions or ids of the rows, which tell samples apart
    time_ids: Tensor | None = None  # (B, 6), XL's sizes and crops where they differ
    mask: Tensor | None = None  # (B, 1, h, w) in [0, 1], of what is learned


def open_stage(settings: UNetSettings, out: Path, images: object) -> UNetStage:
    return UNetStage(settings)


class UNetStage:
    """Our U-Net on cached latents; the autoencoder is frozen, and so is the text encoder unless it has a rate."""

    def __init__(self, settings: UNetSettings):
        s = self.settings = settings
        self.device = pick_device(s.device)
        self.schedule = build(Schedule, s.schedule, "schedule")
        vae, text = vae_part(s), text_parts(s)
        self.vae, self.text = vae.load().to(self.device), text.load().to(self.device)
        torch.manual_seed(seeded.key(s.seed, "unet"))
        unet = self._started() if s.init else UNet(unet_config(s, vae, text))
        self.network: Callable[..., Tensor] = torch.compile(unet) if s.compile else unet
        self.module = nn.ModuleDict({"unet": unet, "text": self._trained_text()}) if s.text_rate else unet
        alone = s.weight_floor is None or current().world == 1
        require(alone, "measures errors in one process: leave it out with several", "weight_floor")
        self.weights = None if s.weight_floor is None else ErrorWeights(s.weight_floor)
        self.tensors = self.weights.tensors if self.weights else {}
        self.xl = unet.config.addition_embed_type == "text_time"
        self.empty_text = self._embed([""])
        self.empty = self._encode([""])
        self.prepared, self.inputs = None, {}
        if is_prepared(s.data.folder):
            encoders = Encoders(self.vae, self.text, ("", ""), self.device)
            texts = not s.text_rate, self.xl
            hashes = (vae.fingerprint, text.fingerprints)
            self.prepared = PreparedDataset(s.data.folder, encoders, hashes, s.seed, s.batch_size, 0.0, *texts)
            self.inputs = {"data": self.prepared.hash}
            self._hold_out_prepared()
        else:
            self.samples = open_samples(s.data, s.seed)
            self._hold_out()

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
        tensors = (x0, noise, fixed_levels(len(x0), s.seed), self._encode(list(found)))
        self.validation: list[Held] = [(*part, None) for part in zip(*(tensor.split(32) for tensor in tensors))]
        self.grid_captions = list(found)[:GRID]

    def _hold_out_prepared(self) -> None:
        """The same of the images that the cache holds out, whose sizes differ."""
        assert self.prepared is not None
        s, batches = self.settings, self.prepared.held_out()
        levels = fixed_levels(max(1, sum(len(batch.latents) for batch in batches)), s.seed)
        self.validation = []
        for number, batch in enumerate(batches):
            u, levels = levels[: len(batch.latents)], levels[len(batch.latents) :]
            noise = seeded.normal(tuple(batch.latents.shape), s.seed, "validation", number).to(self.device)
            self.validation.append((batch.latents, noise, u, self._packed(batch), batch.time_ids))
        captions = [caption for batch in batches or [self.prepared.batch(0)] for caption in batch.captions]
        self.grid_captions = list(dict.fromkeys(captions))[:GRID]

    @torch.no_grad()
    def _embed(self, captions: list[str]) -> Conditioning:
        """The captions' embeddings, with the pooled ones where the U-Net reads them; "" is as guidance has it."""
        if isinstance(self.text, XLText):
            return self.text.encode_together([caption or None for caption in captions])
        return dataclasses.replace(self.text.encode_together(captions), pooled=None)

    def _encode(self, captions: list[str]) -> Tensor:
        """What the pool keeps of captions: their embeddings in one tensor (B, N).

        Where the text encoder is trained along, token ids (B, S).
        """
        if self.settings.text_rate:
            return self.text.tokenize(captions).to(self.device)
        return _flat(self._embed(captions))

    def _packed(self, batch: Batch) -> Tensor:
        """What `_encode` gives, of a prepared batch."""
        if batch.cond is None:
            return self._encode(batch.captions)
        pooled = batch.cond.pooled if self.xl else None
        return _flat(dataclasses.replace(batch.cond, pooled=pooled))

    def _conditioning(self, module: nn.Module, packed: Tensor) -> Conditioning:
        """The embeddings of what `_encode` packed, by the text encoder of `module` where it is trained."""
        if self.settings.text_rate:
            return Conditioning(self._text(module).states(packed).states)
        found, start = {}, 0
        for name, one in self.empty_text.inputs.items():
            if one is not None:
                end = start + one[0].numel()
                found[name] = packed[:, start:end].reshape(-1, *one.shape[1:]).to(one.dtype)
                start = end
        return Conditioning(**found)

    def _text(self, module: nn.Module) -> TextEncoder:
        """The text encoder, with the network of `module` where it is trained."""
        trained = networks_of(module).get("text")
        return self.text if trained is None else ClipText(trained, self.text.tokenizer, self.text.words)

    def _latents(self, images: Tensor) -> Tensor:
        return encode_images(self.vae, images, self.device)

    def batches(self, first_step: int) -> Iterator[PoolBatch]:
        s, part = self.settings, current().part(self.settings.batch_size)
        if self.prepared is not None:
            yield from self._prepared_batches(self.prepared, first_step)
            return
        pool = LatentPool(self.samples, self._latents, self._encode, s.latent_pool, s.renew, s.workers, first_step)
        for number in range(first_step * s.accumulation, s.steps * s.accumulation):
            step, micro = divmod(number, s.accumulation)
            rows = part.of(seeded.integers(s.latent_pool, (s.batch_size,), s.seed, "rows", step, micro))
            pool.at(step)
            yield PoolBatch(pool.latents[rows], pool.texts[rows], part, [pool.captions[row] for row in rows])

    def _prepared_batches(self, data: PreparedDataset, first_step: int) -> Iterator[PoolBatch]:
        s = self.settings
        with closing(data):
            for number in range(first_step * s.accumulation, s.steps * s.accumulation):
                batch = data.batch(number)
                yield PoolBatch(batch.latents, self._packed(batch), batch.part, batch.ids, batch.time_ids, batch.mask)

    def loss(self, batch: PoolBatch, step: int, micro: int) -> Tensor:
        s, (x0, texts, part, samples, time_ids, mask) = self.settings, batch
        size = part.size
        noise = seeded.normal((size, *x0.shape[1:]), s.seed, "noise", step, micro)
        u = seeded.uniform((2, size), s.seed, "timesteps", step, micro)
        even = shape_timesteps(
            (torch.arange(size) + u[0]) / size, s.timesteps, s.timestep_shift
        )  # one from each of B equal parts
        timesteps = timesteps_at(self.schedule, part.of(even)).to(self.device)
        dropped = part.of(u[1] < s.caption_dropout).to(self.device).view(-1, *[1] * (texts.ndim - 1))
        predict = self._predict(self.module, torch.where(dropped, self.empty, texts), time_ids)
        noise = part.of(noise).to(self.device)
        options = {"contrast": s.flow_contrast, "mask": mask}
        losses = training_loss(predict, self.schedule, x0, noise, timesteps, s.snr_gamma, **options)
        if self.weights is not None:
            plain, losses = losses, losses * self.weights.of(samples).to(losses.device)
            self.weights.seen(samples, plain, even)
        return part.mean(losses)

    def _predict(self, module: nn.Module, texts: Tensor, time_ids: Tensor | None = None) -> Predict:
        cond = self._conditioning(module, texts)
        network = self.network if module is self.module else networks_of(module)["unet"]
        bound = conditioned(network, self.time_ids if time_ids is None else time_ids)
        return lambda x, t: bound(x, t, cond)

    @property
    def time_ids(self) -> tuple[float, ...] | None:
        """What XL's U-Net is told of every image: original size, crop, target size."""
        side = float(self.settings.data.resolution)
        return (side, side, 0.0, 0.0, side, side) if self.xl else None

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """On held-out samples, with the same noise and noise levels every time: the loss, and the error of x0."""
        if not self.validation:
            return {}
        bound = ((self._predict(ema, texts, ids), x0, noise, u) for x0, noise, u, texts, ids in self.validation)
        return validation_scores(bound, self.schedule, self.settings.snr_gamma, self.settings.validation_levels)

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """Sixteen held-out captions rendered with fixed seeds."""
        s, captions = self.settings, self.grid_captions
        texts = self._encode(captions)
        cond, uncond = self._conditioning(ema, texts), self._conditioning(ema, self.empty.expand_as(texts))
        side, rows = s.data.resolution // self.vae.factor, range(len(captions))
        shape = (self.vae.latent_channels, side, side)
        sigmas = self.schedule.sigmas(s.sample_steps, s.sampler)
        guidance = Guidance(scale=s.guidance_scale)
        network = networks_of(ema)["unet"]
        if self.time_ids is not None:
            network = partial(network, time_ids=torch.tensor(self.time_ids).to(self.device))
        denoise = guided_denoiser(network, cond, uncond, guidance, self.schedule, sigmas)
        x0 = draw_grid(denoise, self.schedule, sigmas, s.sampler, shape, rows, s.seed, self.device)
        return images.grid(images.to_pil(self.vae.decode(x0).cpu()), columns=8)

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        unet, text = networks_of(ema)["unet"], self._text(ema)
        model = Model(unet=unet, vae=self.vae, text=text, schedule=self.schedule)
        modules = {"unet": unet, "vae": self.vae.module, "text encoder": nn.ModuleList(text.modules)}
        card = unet_card(self.settings, model, self.device.type, modules, scores)
        small = sum(p.numel() for module in modules.values() for p in module.parameters()) < SMALL
        return save_model(model, folder, dtype=torch.bfloat16, max_shard_mb=15 if small else 5000, readme=card)


def _flat(cond: Conditioning) -> Tensor:
    """(B, N) fp32: states, pooled and mask, as far as there are some, one after the other."""
    return torch.cat([tensor.flatten(1).float() for tensor in cond.inputs.values() if tensor is not None], dim=1)
