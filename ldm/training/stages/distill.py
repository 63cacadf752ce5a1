"""Distillation: a model learns to do without guidance, or in few steps, what it does now."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import images
from ldm.checkpoint import Model
from ldm.checkpoint.describe import ModelInfo, describe
from ldm.checkpoint.few_steps import KEY, MODEL_KEY
from ldm.checkpoint.lora import write_lora_into
from ldm.console import say
from ldm.device import DTYPES, pick_device, sent
from ldm.diffusion.denoiser import Predict, denoiser, sample, training_loss
from ldm.diffusion.distillation import (
    Segments,
    consistency_loss,
    crossing_loss,
    guided_teacher,
    intervals_at,
)
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import guided_denoiser
from ldm.nn.lora import frozen_copy, updates_of
from ldm.nn.text import Conditioning
from ldm.nn.unet import UNet, UNetConfig, load_unet
from ldm.pipeline.adapters import Adapter, few_steps_of
from ldm.pipeline.request import Settings as Drawing
from ldm.pipeline.request import card_scale, resolve
from ldm.prompts import plain_text
from ldm.training.data import Batch, DrawnSet, ImageDataset, ImageSet, SceneSet, read_images
from ldm.training.data.encoded import Encoders
from ldm.training.data.trajectories import Crossing, Trajectories, captions_of
from ldm.training.distributed import RowShard, current
from ldm.training.finetuning.base_model import for_training, load_base, make_module
from ldm.training.finetuning.prior import draw_images
from ldm.training.loop import seeded
from ldm.training.loop.step import drawing_precision
from ldm.training.reports.card import distill_card, distill_note
from ldm.training.settings import DistillSettings, lora_name
from ldm.training.stages.common import (
    conditioned,
    decoded,
    diffusion_loss,
    draw_grid,
    fixed_samples,
    grid_captions,
    noise_and_levels,
    square_ids,
    timesteps_at,
)
from ldm.training.stages.export import lora_folder, save_whole

SCALE_WIDTH = 256  # of the scale's embedding, as LCM has it
SCALE_WEIGHT = "time_embedding.cond_proj.weight"
TEACHERS_SAMPLER = "dpmpp_2m"  # of `trajectory`: it adds no noise, so that one noise leads to one image


def open_stage(settings: DistillSettings, out: Path, images: ImageSet | SceneSet | DrawnSet) -> Distill:
    """The stage, ready to train: the model is read, images are drawn where captions alone are given, data encoded."""
    stage = Distill(settings, out)
    if settings.method == "trajectory":
        return stage.open_captions(images)
    if isinstance(images, DrawnSet):
        data, prompts = images.within(out), list(images.prompts)
        drawing = dataclasses.replace(settings.network, data=data)
        what = stage.original(), prompts, Path(data.folder or ""), stage.how, stage.inputs
        current().on_first(lambda: str(draw_images(drawing, *what)))
        images = read_images(data)
    return stage.open(images)


class Distill:
    """The U-Net of a model, trained as a whole or by updates of its layers; as it was at first it is the teacher.

    `open` encodes the data, which may take long; `follow` is given the average, which is the target of `consistency`.
    """

    def __init__(self, settings: DistillSettings, out: Path, model: Model | None = None):
        s = self.settings = settings
        self.out, self.device = Path(out), pick_device(s.device)
        info = describe(model or s.model, None if model else s.vae)
        model = model or load_base(s.network, self.device)
        self.config = model.unet.config  # the teacher's, which is told no scale
        if s.guidance_range:
            model = dataclasses.replace(model, unet=_with_scale_input(model.unet))
        self.model = for_training(s.network, model)
        self.scale = teacher_scale(s, info)
        self.module, self.inputs = make_module(s.network, self.model)
        self.inputs["model"] = self.model.hash
        self.teacher, self.average = frozen_copy(self.module), self.module
        self.uncond = self.model.text.encode([None]).to(self.device, torch.float32)
        self.xl = self.model.unet.config.addition_embed_type == "text_time"
        size = {"height": s.data.resolution, "width": s.data.resolution}
        self.teachers = resolve(size, info)  # how its images are drawn
        self.sampling = sampling_of(s, self.teachers, self.model.schedule.is_flow)
        asked = {name: self.sampling[name] for name in ("sampler", "spacing", "num_inference_steps")}
        self.drawing = resolve({**size, **asked}, info)
        self.segments = Segments(self.model.schedule, self.drawing.runs[0].sigmas)
        if s.method == "trajectory":  # the teacher's steps, of which every `stride`-th is one of the student's
            self.stride = s.teacher_steps // s.segments
            self.steps = self.model.schedule.sigmas(s.teacher_steps, TEACHERS_SAMPLER, self.drawing.spacing)
        self.validation: list[tuple[Batch, Tensor, Tensor]] = []
        self.held_out: list[Crossing] = []
        self._expected: Tensor | None = None  # the teacher's latents of the grid

    def original(self) -> Model:
        """The model before it is trained."""
        return dataclasses.replace(self.model, unet=_with_config(self.teacher, self.config))

    @property
    def how(self) -> dict[str, Any]:
        """How the teacher draws: generate's settings."""
        names = ("sampler", "spacing", "num_inference_steps")
        return {**{name: getattr(self.teachers, name) for name in names}, "guidance_scale": self.scale}

    def open(self, images: ImageSet | SceneSet) -> Distill:
        """Encode the images. Raises DataError."""
        s, model = self.settings, self.model
        if isinstance(images, ImageSet):
            images.cut = model.text.truncated
        encoders = Encoders(model.vae, model.text, (model.hash, model.hash), self.device)
        self.data = ImageDataset(images, encoders, s.seed, s.batch_size, self.out, xl=self.xl)
        self.lines, self.inputs = self.data.lines, {**self.inputs, **self.data.inputs}
        if s.method == "guidance":
            self.validation = fixed_samples(self.data, s.seed, self.device)
        given = list(map(plain_text, s.validation_prompts))
        self.prompts = given or grid_captions(self.data, self.validation, s.samples)
        return self

    def open_captions(self, images: ImageSet | SceneSet | DrawnSet) -> Distill:
        """Take the captions of these images, of which the teacher will draw; and draw those to validate on."""
        s, vae = self.settings, self.model.vae
        captions, held_out = captions_of(images, max(s.validation, s.samples))
        shape = (vae.latent_channels, *[s.data.resolution // vae.factor] * 2)
        known = (sorted(self.inputs.items()), self.scale, s.teacher_steps, s.segments, s.precision, s.seed, shape)
        origin = " ".join(map(str, known))
        self.trajectories = Trajectories(s, captions, self._described, self._trajectories, shape, self.out, origin)
        self.lines = self.trajectories.lines
        say("\n".join(self.lines))
        with drawing_precision(s, self.device):
            self.held_out = self.trajectories.held_out(held_out[: s.validation])
        self.prompts = list(map(plain_text, s.validation_prompts)) or held_out[: s.samples]
        return self

    def follow(self, ema: nn.Module) -> None:
        self.average = ema

    def batches(self, first_step: int) -> Iterator[Batch]:
        if self.settings.method == "trajectory":
            return self.trajectories.batches(first_step)
        return self.data.batches(first_step, self.settings.steps, self.settings.accumulation)

    def loss(self, batch: Batch, step: int, micro: int) -> Tensor:
        s, schedule = self.settings, self.model.schedule
        if isinstance(batch, Crossing):
            return batch.weight * batch.part.mean(self._crossing_loss(self.module, batch))
        scales = batch.part.of(self._scales(batch.part.size, step, micro))
        student, teacher = self._student(self.module, batch, scales), self._teacher(batch, scales)
        if s.method == "guidance":
            return diffusion_loss(student, schedule, s, batch, step, micro, teacher=teacher)
        noise, u = noise_and_levels(s, batch, step, micro)
        sigmas = self.segments.at(batch.part.of(u), intervals_at(step / s.steps, *s.intervals))
        three = (student, teacher, self._student(self.average, batch, scales))
        noise = sent(batch.part.of(noise), self.device)
        how = {"mask": batch.mask}
        losses = consistency_loss(*(denoiser(one, schedule) for one in three), batch.latents, noise, sigmas, **how)
        return batch.weight * batch.part.mean(losses)

    def _crossing_loss(self, unet: nn.Module, batch: Crossing) -> Tensor:
        """(B,) fp32: how far from the teacher's way one step of the student ends."""
        student = denoiser(self._student(unet, batch, torch.empty(0)), self.model.schedule)
        sigmas = self.steps[:: self.stride]
        return crossing_loss(student, batch.latents, batch.ends, sigmas[batch.which], sigmas[batch.which + 1])

    def _described(self, latents: Tensor, captions: list[str], part: RowShard) -> Batch:
        """A batch of these latents (B, C, h, w), of square images that fill the frame."""
        side, count = self.settings.data.resolution, len(captions)
        with torch.autocast(self.device.type, enabled=False):
            cond = self.model.text.encode([caption or None for caption in captions])
        ids = square_ids(side, self.device).repeat(count, 1) if self.xl else None
        cond = cond.to(self.device, torch.float32)
        return Batch(sent(latents, self.device), captions, cond, ids, captions if part.weight else [], part)

    def _trajectories(self, batch: Batch) -> Tensor:
        """x (n + 1, B, C, h, w) of the teacher where the segments begin and end, from the noise of a batch on."""
        schedule, spacing, seen = self.model.schedule, self.drawing.spacing, []
        teacher = denoiser(self._teacher(batch, torch.full((len(batch.latents),), self.scale)), schedule)
        how = {"spacing": spacing, "callback": lambda i, x, x0: seen.append(x)}
        sample(teacher, schedule, self.steps, batch.latents, TEACHERS_SAMPLER, **how)
        start = schedule.initial(batch.latents, self.steps, TEACHERS_SAMPLER, spacing)
        return torch.stack([start, *seen[self.stride - 1 :: self.stride]])

    def _scales(self, size: int, *place: int) -> Tensor:
        """The guidance of each row of a batch, on the CPU."""
        s = self.settings
        if s.guidance_range is None:
            return torch.full((size,), self.scale)
        low, high = s.guidance_range
        return low + (high - low) * seeded.uniform((size,), s.seed, "guidance", *place)

    def _student(self, unet: nn.Module, batch: Batch, scales: Tensor) -> Predict:
        told = sent(scales, self.device) if self.settings.guidance_range else None
        network, cond = conditioned(unet, batch.time_ids, told), _texts(batch)
        return lambda x, timesteps: network(x, timesteps, cond)

    def _teacher(self, batch: Batch, scales: Tensor) -> Predict:
        """The model as it was, with guidance."""
        cond, ids = _texts(batch), batch.time_ids
        if bool((scales > 1).any()):
            cond = Conditioning.cat([*[self.uncond] * len(cond), cond])
            ids = None if ids is None else torch.cat([ids, ids])
        network = conditioned(self.teacher, ids)
        return guided_teacher(lambda x, timesteps: network(x, timesteps, cond), scales)

    @torch.no_grad()
    def validate(self, ema: nn.Module, step: int) -> dict[str, float]:
        """How far the student's images are from the teacher's (RMS of latents, same noise); of guidance its loss too.

        The loss is that of held-out samples, with the same noise and noise levels every time.
        """
        found, schedule, s = {}, self.model.schedule, self.settings
        if self.held_out:
            found["validation_loss"] = torch.cat([self._crossing_loss(ema, one) for one in self.held_out]).mean().item()
        if self.validation:
            losses = []
            for number, (batch, noise, u) in enumerate(self.validation):
                scales = self._scales(len(noise), -1, number)
                student, teacher = self._student(ema, batch, scales), self._teacher(batch, scales)
                at = timesteps_at(schedule, u).to(self.device)
                more = {"teacher": teacher, "mask": batch.mask}
                losses.append(training_loss(student, schedule, batch.latents, noise, at, s.snr_gamma, **more))
            found["validation_loss"] = torch.cat(losses).mean().item()
        if self.prompts:
            found["teacher_distance"] = (self._drawn(ema) - self._drawn_by_teacher()).square().mean().sqrt().item()
        return found

    @torch.no_grad()
    def sample_grid(self, ema: nn.Module):
        """The teacher's images with guidance, and below them the student's."""
        if not self.prompts:
            return None
        latents = torch.cat([self._drawn_by_teacher(), self._drawn(ema)])
        return images.grid(images.to_pil(decoded(self.model.vae, latents)), columns=len(self.prompts))

    def _drawn(self, unet: nn.Module) -> Tensor:
        """The student's latents (B, C, h, w) of the grid."""
        told = {"guidance": torch.tensor(self.scale)} if self.settings.guidance_range else {}
        return self._draw(unet, self.drawing, 1.0, told)

    def _drawn_by_teacher(self) -> Tensor:
        if self._expected is None:
            self._expected = self._draw(self.teacher, self.teachers, self.scale, {})
        return self._expected

    def _draw(self, unet: nn.Module, drawing: Drawing, scale: float, told: Mapping[str, Tensor]) -> Tensor:
        s, vae, text, schedule = self.settings, self.model.vae, self.model.text, self.model.schedule
        side, sigmas = s.data.resolution, drawing.runs[0].sigmas
        network: Callable[..., Tensor] = unet
        if self.xl:  # original size, crop, target size
            network = partial(network, time_ids=square_ids(side, self.device))
        shape, found = (vae.latent_channels, *[side // vae.factor] * 2), []
        for rows in torch.arange(len(self.prompts)).split(s.batch_size):
            cond, uncond = text.encode([self.prompts[row] for row in rows]), text.encode([None] * len(rows))
            more = {name: value.expand(len(rows)).to(self.device) for name, value in told.items()}
            called = partial(network, **more) if more else network
            denoise = guided_denoiser(called, cond, uncond, Guidance(scale=scale), schedule, sigmas)
            how = (drawing.sampler, shape, rows.tolist(), s.seed, self.device, drawing.spacing)
            found.append(draw_grid(denoise, schedule, sigmas, *how))
        return torch.cat(found)

    @torch.no_grad()
    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path:
        """Write both files of a LoRA into the run's folder (those of another average into `folder`), or a model into
        `folder`; returns that folder."""
        s = self.settings
        if s.train == "full":
            assert isinstance(ema, UNet)
            model = dataclasses.replace(self.model, unet=ema)
            card = partial(distill_card, s, model, self.device.type, self.sampling, scores=scores)
            return save_whole(model, folder, s.save_dtype or "bf16", card)
        dtype = getattr(torch, DTYPES[s.save_dtype or "fp16"])
        header = {KEY: json.dumps(self.sampling), MODEL_KEY: self.model.hash}
        note = distill_note(s, self.sampling, scores)
        name = lora_name(s.name or self.out.resolve().name)
        place = lora_folder(self.out, folder)
        write_lora_into(place, name, self.original(), {"unet": updates_of(ema)}, dtype, note, metadata=header)
        say(f"to draw with it: ldm generate … --lora {place}")
        return place


def _texts(batch: Batch) -> Conditioning:
    assert batch.cond is not None  # the dataset embeds captions
    return batch.cond


def _with_scale_input(unet: UNet) -> UNet:
    """The same network with the guidance's scale as an input, which changes nothing yet."""
    if unet.config.time_cond_proj_dim is not None:
        return unet
    zeros = torch.zeros(unet.config.block_out_channels[0], SCALE_WIDTH, device=unet.conv_in.weight.device)
    config = dataclasses.replace(unet.config, time_cond_proj_dim=SCALE_WIDTH)
    return load_unet(config, {**unet.state_dict(), SCALE_WEIGHT: zeros})


def _with_config(unet: UNet, config: UNetConfig) -> UNet:
    """The same network, without the guidance's scale as an input where `config` has none."""
    if unet.config == config:
        return unet
    return load_unet(config, {name: value for name, value in unet.state_dict().items() if name != SCALE_WEIGHT})


def teacher_scale(settings: DistillSettings, info: ModelInfo) -> float:
    """The teacher's guidance; of several that images are drawn with the one in the middle."""
    s = settings
    if s.guidance_range:
        return sum(s.guidance_range) / 2
    if s.guidance_scale is not None:
        return s.guidance_scale
    distilled = info.few or (s.init and few_steps_of([Adapter(Path(s.init), 1.0)]))
    return 1.0 if distilled else card_scale(info)


def sampling_of(settings: DistillSettings, teachers: Drawing, is_flow: bool) -> dict[str, Any]:
    """How the student is to be drawn with: generate's settings, which its file carries."""
    s = settings
    if s.method != "guidance":
        spacing = None if is_flow else "trailing"
        known = {"kind": "few-step", "sampler": "ddim", "spacing": spacing, "num_inference_steps": s.segments}
        return {**known, "guidance_scale": 1.0}
    scale = sum(s.guidance_range) / 2 if s.guidance_range else 1.0
    known = {"kind": "guidance-distilled", "sampler": teachers.sampler, "spacing": teachers.spacing}
    return {**known, "num_inference_steps": teachers.num_inference_steps, "guidance_scale": scale}
