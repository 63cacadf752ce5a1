"""The checks of a run before any work: data, font, models to start from, names in the networks' settings."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import build, require
from ldm.device import pick_device
from ldm.errors import ConfigError, ModelError, ResourceError, nearest
from ldm.files import MANIFEST, require_writable, sha256
from ldm.training.distributed import current
from ldm.training.settings import (
    OFF,
    AutoencoderSettings,
    FinetuneData,
    FinetuneSettings,
    Settings,
    TextSettings,
    UNetSettings,
    as_dict,
    check_file_name,
)

if TYPE_CHECKING:
    from ldm.checkpoint.lora import Target
    from ldm.training.data import ImageSet

BY_ROWS = ("autoencoder", "unet", "finetune")  # stages whose loss is a mean over the images of a batch
INPUTS = ("vae", "text", "init")  # settings that name a run or a model's folder


def check(settings: Settings) -> None:
    """Raise ConfigError, DataError or ModelError for what would stop the run later. Reads no weight and no image."""
    from ldm.training.loop.step import check_means

    check_means(settings)
    if isinstance(settings, FinetuneSettings):
        _check_finetune(settings)
    else:
        _check_stage(settings)


def _check_stage(settings: Settings) -> None:
    """The checks of a stage that makes a model from nothing."""
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


def check_processes(settings: Settings) -> None:
    """Raise ConfigError for settings that do not go with the number of processes or their kind."""
    group = current()
    if group.world == 1:
        return
    count, device = f"{group.world} processes", pick_device(settings.device)
    known = settings.stage in BY_ROWS
    require(known, f"{settings.stage} compares the images of a batch: train it on one process", "stage")
    fits = settings.batch_size >= group.world
    require(fits, f"{settings.batch_size} images are too few for {count}: raise it, or start fewer", "batch_size")
    require(device.type != "mps", f"mps is for one process, not for {count}: use device=cpu", "device")
    if device.type == "cuda":
        import torch

        there = torch.cuda.device_count()
        fits = int(os.environ.get("LOCAL_RANK", 0)) < there
        require(fits, f"this machine has {there} GPUs: start as many processes on it, not more", "device")
    if group.sharded:
        _check_sharded(settings)


def check_same_settings(settings: Settings, out: Path) -> None:
    """Raise ConfigError where a process has other settings than the first one, each having resolved them by itself."""
    group = current()
    digest = hashlib.sha256(json.dumps(as_dict(settings), sort_keys=True).encode()).hexdigest()
    expected = group.on_first(lambda: digest)
    what = f"process {group.rank} of {group.world} has other settings than process 0: give all of them"
    group.on_all(lambda: require(digest == expected, what, str(out)))


def _check_sharded(s: Settings) -> None:
    whole = f"{s.optimizer} needs whole tensors, of which FSDP2 keeps parts: use adamw"
    require(s.optimizer not in ("muon", "adamw8bit"), whole, "optimizer")
    require(s.precision != "fp16", "fp16 does not go with FSDP2: use bf16", "precision")
    require(s.stage != "autoencoder", "autoencoder is small: train it without FSDP2", "stage")
    require(not getattr(s, "compile", False), "does not go with FSDP2", "compile")


def check_lock(out: Path) -> None:
    """Raise ConfigError where this process does not see the run's folder, which the first one has locked."""
    group = current()
    is_seen = (out / ".lock").exists()
    require(is_seen, f"process {group.rank} of {group.world} does not see {out}: use a folder that all share", "out")


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


def _check_finetune(s: FinetuneSettings) -> None:
    """What is known without a weight: of the model, the LoRA to continue, the machine."""
    from ldm.checkpoint.describe import describe
    from ldm.checkpoint.lora import target_at
    from ldm.diffusion import names
    from ldm.nn.attention import check_backend
    from ldm.training.finetuning.base_model import chosen_layers, schedule_for

    pick_device(s.device)
    check_backend(s.attention)
    if s.sampler is not None:
        names.resolve(s.sampler)
    prediction_type = None if s.prediction_type == "flow" else s.prediction_type
    info = describe(s.model, s.vae, prediction_type)
    if (takes := info.unet.in_channels) != (gives := info.unet.out_channels):
        what = f"its U-Net takes {takes} channels, and gives {gives}: an inpainting model, perhaps"
        raise ModelError(what, where=s.model, hint="fine-tune a text-to-image model")
    schedule_for(s, info.schedule)
    if prediction_type is not None and s.train != "full":
        _check_prediction_type(s)
    if s.text_encoder and not info.clip_layers:
        raise ConfigError("is for CLIP alone, and this model has T5", where="text_encoder", hint="leave it out")
    target = target_at(s.model, prediction_type)
    if s.init is not None:
        _check_init(s, target)
    elif s.train != "full" and target is not None:
        shapes = {part: layers for part, layers in target.shapes.items() if s.text_encoder or part == "unet"}
        chosen_layers(shapes, s.targets, s.lora_rank)


def _check_prediction_type(s: FinetuneSettings) -> None:
    """Raise ConfigError where a LoRA asks for another prediction type than that of the model, if that is known."""
    from ldm.checkpoint.describe import describe
    from ldm.training.finetuning.base_model import schedule_for

    try:
        schedule = describe(s.model, s.vae).schedule
    except ModelError:  # a single file that does not tell it
        return
    schedule_for(s, schedule)


def _check_init(s: FinetuneSettings, target: Target | None) -> None:
    """Raise ConfigError or ModelError where the LoRA to continue does not fit the settings or the model."""
    from ldm.checkpoint.lora import read_lora_header
    from ldm.training.finetuning.base_model import places_of

    header = read_lora_header(s.init)
    kind = "dora" if header.dora else "lora"
    require(s.train == kind, f"the LoRA to continue is a {kind}, and train is {s.train}", "train")
    if target is not None:
        text = any(part != "unet" for part, _ in places_of(header, target).values())
        has = "has layers of the text encoder" if text else "has no layer of the text encoder"
        require(text == s.text_encoder, f"must be {str(text).lower()}: the LoRA to continue {has}", "text_encoder")


def require_place(folder: str | Path) -> None:
    """Raise ResourceError, with the exit code of a refusal, unless a file can be created in `folder`."""
    try:
        require_writable(folder)
    except ResourceError as error:
        error.exit_code = ConfigError.exit_code
        raise


def check_run_folder(data: FinetuneData, out: Path, names_file: bool) -> None:
    """Raise ConfigError or ResourceError where a fine-tuning cannot use the run's folder or the cache's.

    `names_file`: a LoRA's file for A1111 and ComfyUI has the name of the run's folder.
    """
    if names_file:
        check_file_name(out.resolve().name, "out")
    require_place(out)
    folder = Path(data.folder)
    if folder.is_dir() and (out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents):
        what = f"lies in {data.folder}, whose images are trained on: the run's own would be among them"
        raise ConfigError(what, where=out, hint="choose another folder for the run")
    if out.is_dir() and not (out / "settings.json").is_file():
        names = [path.name for path in sorted(out.iterdir()) if not path.name.startswith(".") and path.name != "cache"]
        if names:
            raise ConfigError(f"is no run, and holds {names[0]}", where=out, hint="choose a new folder")
    if data.cache != OFF:
        require_place(data.cache or out / "cache")


def check_export(settings: FinetuneSettings, images: ImageSet) -> None:
    """Raise ConfigError where the best checkpoint is to be exported and no image is held out to find it."""
    if settings.export == "best" and not images.held_out:
        what = "best is by the validation loss, and no image is held out"
        raise ConfigError(what, where="export", hint="raise held_out, or use export=last")


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
    if isinstance(settings, FinetuneSettings):
        return {}  # the stage has the hash of everything that it loaded
    folders = {name: model_folder(getattr(settings, name)) for name in INPUTS[:2] if getattr(settings, name, None)}
    return {name: sha256(folder / MANIFEST) for name, folder in folders.items() if (folder / MANIFEST).is_file()}
