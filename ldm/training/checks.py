"""The checks of stages that make a model from nothing: data, font, models to start from, names of settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.checkpoint.describe import describe
from ldm.checkpoint.parts import find_vae, model_folder
from ldm.config import build, require
from ldm.data.cache.prepared import read_info
from ldm.data.sources.walk import is_prepared
from ldm.errors import ConfigError, DataError, ModelError, nearest
from ldm.training.parts import is_mmdit, network_config, text_parts, vae_part
from ldm.training.settings import (
    AutoencoderSettings,
    DistillSettings,
    Settings,
    TextSettings,
    UNetSettings,
)


def check_stage(settings: Settings) -> None:
    """Raise ConfigError, DataError or ModelError for what would stop a stage later. Reads no weight and no image."""
    from ldm.data.emoji import find_font

    if init := getattr(settings, "init", None):
        folder = model_folder(init)
    if isinstance(settings, AutoencoderSettings):
        _known_names(settings.model, _autoencoder_names(), "model")
        if init:
            settings.check_sizes(find_vae(str(folder)).factor)
    elif isinstance(settings, TextSettings):
        from transformers import CLIPTextConfig, CLIPVisionConfig

        vae_part(settings)
        _known_names(settings.model, CLIPTextConfig().to_dict(), "model")
        _known_names(settings.image_tower, CLIPVisionConfig().to_dict(), "image_tower")
    elif isinstance(settings, UNetSettings):
        _check_unet(settings)
    if is_prepared(settings.data.folder):
        return _check_prepared(settings)
    if not settings.data.folder:
        find_font(settings.data.font)


def check_distill(settings: DistillSettings) -> None:
    """Raise ConfigError, DataError or ModelError for what would stop a distillation later. Reads no weight."""
    from ldm.data.emoji import find_font
    from ldm.training.finetuning.checks import check_finetune

    s, info = settings, describe(settings.model, settings.vae)
    if info.transformer:
        what = "is a flow transformer (SD3, FLUX), and distilling it is not supported"
        raise ModelError(what, where=s.model, hint="distil a U-Net")
    check_finetune(s.network)
    if s.method != "guidance":
        info.schedule.sigmas(s.segments, "ddim", None if info.schedule.is_flow else "trailing")
    if is_prepared(s.data.folder):
        _check_prepared(s)
    if not (s.data.folder or s.prompts) and s.method != "trajectory":  # which needs captions alone
        find_font(s.data.font)


def _check_prepared(settings: Settings) -> None:
    """Raise ConfigError or DataError where a prepared dataset is not what the settings are for."""
    where, info = settings.data.folder, read_info(settings.data.folder)
    if not isinstance(settings, UNetSettings):
        raise DataError("holds latents, which the stage unet reads", where=where, hint="give the images")
    made, asked = info["resolution"], settings.data.resolution
    hint = f"set data.resolution={made}, or make another cache"
    if made != asked:
        raise ConfigError(f"is {asked}, and {where} was made at {made} px", where="data.resolution", hint=hint)
    if settings.data.masks and not info.get("masks"):
        raise ConfigError(f"{where} was made without masks", where="data.masks", hint="make it with --masks")


def _check_unet(settings: UNetSettings) -> None:
    from ldm.diffusion import names
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.schedule import Schedule
    from ldm.nn.mmdit_config import MMDiTConfig
    from ldm.nn.unet import UNetConfig

    kind = MMDiTConfig if is_mmdit(settings) else UNetConfig
    _known_names(settings.model, ["type", *(field.name for field in dataclasses.fields(kind))], "model")
    require(kind is UNetConfig or not settings.init, "is for U-Nets: leave it out", "init")
    _known_names([settings.sampler], SAMPLERS, "sampler")
    schedule = build(Schedule, settings.schedule, "schedule")
    names.check(settings.sampler, schedule.prediction_type)
    schedule.sigmas(settings.sample_steps, settings.sampler)
    vae, text = vae_part(settings), text_parts(settings)
    network_config(settings, vae, text)
    text.check()


def _autoencoder_names() -> list[str]:
    from diffusers import AutoencoderKL

    return list(inspect.signature(AutoencoderKL.__init__).parameters)[1:]


def _known_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise ConfigError for unknown names, which these libraries ignore: they use the default of what was meant."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}", where=where, hint=nearest(str(name), known))


def check_same(given: Mapping[str, Any], config: Mapping[str, Any], init: str) -> None:
    """Raise ConfigError where the settings ask for another network than the `config` of the one to start from."""
    for name, value in given.items():
        have = config[name]
        same = list(value) == list(have) if isinstance(value, (list, tuple)) else value == have
        require(same, f"asks for {value}, but {init} has {have}: leave it out, or leave out init", f"model.{name}")
