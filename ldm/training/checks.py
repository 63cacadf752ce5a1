"""The checks of stages that make a model from nothing: data, font, models to start from, names of settings."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.config import build, require
from ldm.errors import ConfigError, ModelError, nearest
from ldm.files import MANIFEST, sha256
from ldm.training.settings import (
    AutoencoderSettings,
    Settings,
    TextSettings,
    UNetSettings,
)

INPUTS = ("vae", "text", "init")  # settings that name a run or a model's folder


def check_stage(settings: Settings) -> None:
    """Raise ConfigError, DataError or ModelError for what would stop a stage later. Reads no weight and no image."""
    from ldm.data.emoji import find_font
    from ldm.training.data.samples import open_samples

    for name in INPUTS:
        if getattr(settings, name, None):
            model_folder(getattr(settings, name))
    if isinstance(settings, AutoencoderSettings):
        _known_names(settings.model, _autoencoder_names(), "model")
    elif isinstance(settings, TextSettings):
        from transformers import CLIPTextConfig, CLIPVisionConfig

        _known_names(settings.model, CLIPTextConfig().to_dict(), "model")
        _known_names(settings.image_tower, CLIPVisionConfig().to_dict(), "image_tower")
    elif isinstance(settings, UNetSettings):
        _check_unet(settings)
    if not settings.data.folder:
        find_font(settings.data.font)
    open_samples(settings.data, settings.seed)


def _check_unet(settings: UNetSettings) -> None:
    from ldm.diffusion import names
    from ldm.diffusion.samplers import SAMPLERS
    from ldm.diffusion.schedule import Schedule
    from ldm.nn.unet import UNetConfig

    _known_names(settings.model, [field.name for field in dataclasses.fields(UNetConfig)], "model")
    _known_names([settings.sampler], SAMPLERS, "sampler")
    schedule = build(Schedule, settings.schedule, "schedule")
    names.check(settings.sampler, schedule.prediction_type)
    schedule.sigmas(settings.sample_steps, settings.sampler)


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


def model_folder(run: str | Path) -> Path:
    """The diffusers folder that `run` is or holds (`RUN/model`). Raises ModelError where there is none."""
    for folder in (Path(run) / "model", Path(run)):
        if any((folder / part).is_dir() for part in ("vae", "unet", "text_encoder")):
            return folder
    raise ModelError("holds no model", where=run, hint="give a finished run of ldm train, or a diffusers folder")


def fingerprints(settings: Settings) -> dict[str, str]:
    """The sha256 of the manifest of each model that the run reads, by setting; models without one are left out."""
    folders = {name: model_folder(getattr(settings, name)) for name in INPUTS[:2] if getattr(settings, name, None)}
    return {name: sha256(folder / MANIFEST) for name, folder in folders.items() if (folder / MANIFEST).is_file()}
