"""Stage 4, fine-tuning: an existing model on the user's images, as a whole or by LoRA and DoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from ldm import images
from ldm.checkpoint import Model
from ldm.checkpoint.describe import describe
from ldm.checkpoint.lora import networks, with_networks, write_lora_into
from ldm.console import say
from ldm.device import DTYPES, pick_device
from ldm.diffusion.denoiser import Predict
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.nn.lora import folded, updates_of
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.offload import at_work
from ldm.nn.text import Conditioning, TextEncoder, known_words
from ldm.pipeline.engine import told_scales
from ldm.pipeline.request import card_scale, resolve
from ldm.prompts import plain_text
from ldm.training.data import Batch, ImageDataset, ImageSet, SceneSet
from ldm.training.data.encoded import Encoders
from ldm.training.distributed import current
from ldm.training.distributed.alone import is_sharded
from ldm.training.finetuning.base_model import for_training, load_base, make_module
from ldm.training.finetuning.text_encoder import encode
from ldm.training.loop.loop import ask_for_space
from ldm.training.reports.card import name_of
from ldm.training.settings import OFF, FinetuneSettings, lora_name
from ldm.training.stages.common import (
    conditioned,
    decoded,
    diffusion_loss,
    draw_grid,
    fixed_samples,
    grid_captions,
    model_shift,
    networks_of,
    square_ids,
    validation_scores,
)
from ldm.training.stages.export import lora_folder, save_finetuned

Stage = TypeVar("Stage", bound="Finetune")


def open_stage(settings: FinetuneSettings, out: Path, images: ImageSet) -> Finetune:
    """The stage, ready to train: the model is read, and the data encoded."""
    return opened(Finetune(settings, out), images)


def opened(stage: Stage, images: ImageSet | SceneSet) -> Stage:
    """The stage with its data, where the disk has room for its checkpoints."""
    if current().first:  # before the data is encoded, which may take hours
        ask_for_space(stage.module, stage.settings, stage.out)
    return stage.open(images)


class Finetune:
    """The U-Net or flow transformer of a model (and a U-Net's CLIP, where that is asked for), trained as a whole or by
    updates of its layers.

    `open` encodes the data, which may take long; until then the stage can be measured, and not trained. `model` is the
    model of the settings, where it is loaded already; it is changed.
    """

    dataset_type: type[ImageDataset] = ImageDataset

    def __init__(self, settings: FinetuneSettings, out: Path, model: Model | None = None):
        s = self.settings = settings
        self.out, self.device = Path(out), pick_device(s.device)
        self.model = for_training(s, model or load_base(s, self.device))
        self.module, self.inputs = make_module(s, self.model)
        self.inputs["model"] = self.model.hash
        unet = networks_of(self.module)["unet"]
        self.network: Callable[..., Tensor] = torch.compile(unet) if s.compile else unet
        self.config = self.model.unet.config
        self.xl = self.config.takes_sizes
        side = s.data.resolution
        asked = {"num_inference_steps": s.sample_steps, "height": side, "width": side, "sampler": s.sampler}
        info = describe(self.model)
        self.drawing = resolve(asked, info)
        self.guidance_scale = card_scale(info) if s.guidance_scale is None else s.guidance_scale

    def open(self, images: ImageSet | SceneSet) -> Self:
        """Encode the images. Raises DataError."""
        s, model = self.settings, self.model
        for prompt in dict.fromkeys(s.validation_prompts):
            if lost := model.text.truncated(prompt):
                say(f"validation prompt {prompt[:40]!r}…: its end is not seen by the text encoder: {lost!r}")
        self._encode(images, Encoders(model.vae, model.text, (model.hash, model.hash), self.device))
        self.validation = fixed_samples(self.data, s.seed, self.device)
        if isinstance(self.config, MMDiTConfig) and isinstance(images, ImageSet) and s.data.cache != OFF:
            model.text.to("cpu")  # all captions are encoded: training has the room of T5
        self.prompts = list(map(plain_text, s.validation_prompts)) or grid_captions(
            self.data, self.validation, s.samples
        )
        return self

    def _encode(self, images: ImageSet | SceneSet, encoders: Encoders) -> None:
        self.data = self._dataset(images, encoders)
        self.lines, self.inputs = self.data.lines, {**self.inputs, **self.data.inputs}

    def batches(self, first_step: int) -> Iterator[Batch]:
        return self.data.batches(first_step, self.settings.steps, self.settings.accumulation)

    def _dataset(self, images: ImageSet | SceneSet, encoders: Encoders) -> ImageDataset:
        s = self.settings
        if isinstance(images, ImageSet):
            images.cut = self.model.text.truncated
        return self.dataset_type(images, encoders, s.seed, s.batch_size, self.out, not s.text_encoder, self.xl)

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        return self._loss(batch, "", step, micro)

    def _loss(self, batch: Batch, kind: str, step: int, micro: int, teacher: Predict | None = None) -> Tensor:
        """`kind` is "prior " for a prior's batches, which may learn what the `teacher` predicts."""
        schedule, predict = self.model.schedule, self._predict(self.module, batch)
        shift = model_shift(schedule, self.config, batch.latents)
        return diffusion_loss(predict, schedule, self.settings, batch, step, micro, kind, teacher, shift=shift)

    def _predict(self, module: nn.Module, batch: Batch) -> Predict:
        """The network of `module` under the batch's captions, which its text encoders read where they are trained."""
        cond = batch.cond if batch.cond is not None else encode(self._text(module), batch.captions)
        unet = self.network if module is self.module else networks_of(module)["unet"]
        told = self.settings.embedded_guidance
        guidance = batch.latents.new_full((len(batch.latents),), told) if self.config.embeds_guidance else None
        network = conditioned(unet, batch.time_ids, guidance)
        return lambda x, timesteps: network(x, timesteps, cond)

    def _text(self, module: nn.Module) -> TextEncoder:
        """The text encoder with the networks of `module`, where it has some."""
        originals, trained = networks(self.model), networks_of(module)
        return with_networks(self.model.text, {id(originals[p]): trained[p] for p in trained if p != "unet"})

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """The loss and the error of x0 on held-out images, with the same noise and noise levels every time."""
        if not self.validation:
            return {}
        plain = self._plain(ema)
        parts = ((self._predict(plain, b), b.latents, noise, u, b.mask) for b, noise, u in self.validation)
        return validation_scores(parts, self.model.schedule, self.settings.snr_gamma)

    def _plain(self, module: nn.Module) -> nn.Module:
        """The module with merged layers, as whoever loads the export has it.

        A module that FSDP2 shards cannot be copied: there each layer merges its weights when it is called.
        """
        return module if self.settings.train == "full" or is_sharded(module) else folded(module)

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """The prompts drawn with fixed seeds."""
        s, drawing, vae = self.settings, self.drawing, self.model.vae
        if not self.prompts:
            return None
        plain = self._plain(ema)
        text, side = self._text(plain), s.data.resolution
        network, shape = networks_of(plain)["unet"], (vae.latent_channels, *[side // vae.factor] * 2)
        if self.xl:  # original size, crop, target size
            network = partial(network, time_ids=square_ids(side, self.device))
        schedule, sigmas, guidance = self.model.schedule, drawing.runs[0].sigmas, Guidance(scale=self.guidance_scale)
        if self.config.embeds_guidance:
            network, guidance = told_scales(network, [self.guidance_scale]), Guidance(scale=1.0)
        drawn = []
        for rows in (range(len(self.prompts))[i : i + s.batch_size] for i in range(0, len(self.prompts), s.batch_size)):
            cond, uncond = self._encoded(text, [self.prompts[row] for row in rows], [""] * len(rows))
            denoise = guided_denoiser(network, cond, uncond, guidance, schedule, sigmas)
            how = (drawing.sampler, shape, rows, s.seed, self.device, drawing.spacing)
            drawn.append(decoded(vae, draw_grid(denoise, schedule, sigmas, *how)))
        return images.grid(images.to_pil(torch.cat(drawn)), columns=min(len(self.prompts), 8))

    def _encoded(self, text: TextEncoder, *lists: list[str]) -> list[Conditioning]:
        """The prompts of each list in fp32, by a text encoder that may wait in main memory."""
        with nullcontext(text) if text.device.type == self.device.type else at_work(text, self.device) as lent:
            return [lent.encode(prompts).to(self.device, torch.float32) for prompts in lists]

    @torch.no_grad()
    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        """Write both files of a LoRA into the run's folder (those of another average into `folder`), or a model into
        `folder`; returns that folder."""
        s, plain = self.settings, self._plain(ema)
        model = dataclasses.replace(self.model, unet=networks_of(plain)["unet"], text=self._text(plain))
        if s.train == "full":
            return save_finetuned(model, folder, s, self._words(), scores)
        layers = {part: updates_of(network) for part, network in networks_of(ema).items()}
        dtype = getattr(torch, DTYPES[s.save_dtype or "fp32"])
        note = finetune_note(s, self.data.lines, scores)
        place = lora_folder(self.out, folder)
        write_lora_into(place, self._name, model, layers, dtype, note, self._words())
        return place

    @property
    def _name(self) -> str:
        """The name of the file for A1111 and ComfyUI."""
        return lora_name(self.settings.name or self.out.resolve().name)

    def _words(self) -> frozenset[str]:
        """The words of the captions, where the text encoder knows which words it was trained on."""
        if getattr(self.model.text, "words", None) is None:
            return frozenset()
        return known_words(self.data.captions(None))


def finetune_note(settings: FinetuneSettings, lines: Sequence[str], scores: Mapping[str, float]) -> str:
    """A paragraph for a LoRA's card: what it was trained on, how long, and its scores."""
    s = settings
    last = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    counts = lines[1] if len(lines) > 1 else ""  # the first line names the layout
    steps = f"{s.steps} steps of {s.batch_size * s.accumulation} images, learning rate {s.learning_rate:g}"
    return f"Trained on `{name_of(s.data.folder)}` ({counts}): {steps}.{f' Scores: {last}.' if last else ''}"
