"""What can be said against a run before any work: data, font, models to start from, names in the networks' settings."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import build, require
from ldm.device import pick_device
from ldm.errors import ConfigError, ModelError, ResourceError, nearest
from ldm.files import MANIFEST, require_writable, sha256
from ldm.training.data import OFF, FinetuneData
from ldm.training.distributed import current
from ldm.training.finetuning.prior import check_drawn_prior
from ldm.training.settings import AutoencoderSettings, FinetuneSettings, Settings, TextSettings, UNetSettings

if TYPE_CHECKING:
    from ldm.training.data import Pictures

BY_ROWS = ("autoencoder", "unet", "finetune")  # stages whose loss is a mean over the pictures of a batch
INPUTS = ("vae", "text", "init")  # settings that name a run or a model's folder


def check(settings: Settings) -> None:
    """Raise ConfigError, DataError or ModelError for what would stop the run later. Reads no weight and no picture."""
    from ldm.data.emoji import find_font
    from ldm.training.data.samples import open_samples
    from ldm.training.loop.step import check_means

    check_means(settings)
    if isinstance(settings, FinetuneSettings):
        return _check_finetune(settings)
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
    """Raise ConfigError for what cannot be trained on as many processes as there are, or not in this way."""
    group = current()
    if group.world == 1:
        return
    count, device = f"{group.world} processes", pick_device(settings.device)
    known = settings.stage in BY_ROWS
    require(known, f"{settings.stage} compares the pictures of a batch: train it on one process", "stage")
    fits = settings.batch_size >= group.world
    require(fits, f"{settings.batch_size} pictures are too few for {count}: raise it, or start fewer", "batch_size")
    require(device.type != "mps", f"mps is for one process, not for {count}: use device=cpu", "device")
    if device.type == "cuda":
        import torch

        there = torch.cuda.device_count()
        fits = int(os.environ.get("LOCAL_RANK", 0)) < there
        require(fits, f"this machine has {there} GPUs: start as many processes on it, not more", "device")
    if group.sharded:
        _check_sharded(settings)


def _check_sharded(s: Settings) -> None:
    whole = f"{s.optimizer} needs whole tensors, of which FSDP2 keeps parts: use adamw"
    require(s.optimizer not in ("muon", "adamw8bit"), whole, "optimizer")
    require(s.precision != "fp16", "fp16 does not go with FSDP2: use bf16", "precision")
    require(s.stage != "autoencoder", "autoencoder is small: train it without FSDP2", "stage")
    require(not getattr(s, "compile", False), "does not go with FSDP2", "compile")


def check_lock(out: Path) -> None:
    """Raise ConfigError where this process does not see the run's folder, which the first one has locked."""
    group = current()
    seen = (out / ".lock").exists()
    require(seen, f"process {group.rank} of {group.world} does not see {out}: use a folder that all share", "out")


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
    """All that is known without a weight or a picture: of the model, the LoRA to go on from, the machine."""
    from ldm.checkpoint.lora import read_lora_header, target_at
    from ldm.checkpoint.model import check_model
    from ldm.diffusion import names
    from ldm.nn.attention import check_backend

    pick_device(s.device)
    check_backend(s.attention)
    if s.sampler is not None:
        names.resolve(s.sampler)
    own = None if s.prediction_type == "flow" else s.prediction_type
    place = check_model(s.model, s.vae, own)
    _check_schedule(s, place)
    if s.text_encoder:
        _check_clip(place)
    target = target_at(s.model, own)
    if target is not None and (have := target.unet.in_channels) != (gives := target.unet.out_channels):
        what = f"its U-Net takes {have} channels, and gives {gives}: an inpainting model, perhaps"
        raise ModelError(what, where=s.model, todo="fine-tune a text-to-image model")
    if s.init is not None:
        header = read_lora_header(s.init)
        kind = "dora" if header.dora else "lora"
        require(s.train == kind, f"the LoRA to go on from is a {kind}, and train is {s.train}", "train")
        if target is not None:
            from ldm.training.finetuning.base_model import places_of

            text = any(part != "unet" for part, _ in places_of(header, target).values())
            what = (
                "the LoRA to go on from has layers of the text encoder" if text else "it has none of the text encoder"
            )
            require(text == s.text_encoder, f"must be {str(text).lower()}: {what}", "text_encoder")
    elif s.train != "full" and target is not None:
        from ldm.training.finetuning.base_model import chosen_layers

        shapes = {part: own for part, own in target.shapes.items() if s.text_encoder or part == "unet"}
        chosen_layers(shapes, s.targets, s.lora_rank)
    check_drawn_prior(s)
    if s.prior is not None:
        from ldm.data.sources import open_source

        open_source(s.prior, s.data.captions, s.data.split)


def _check_schedule(s: FinetuneSettings, place: Path) -> None:
    """What the model says of its prediction type and schedule against what the settings want."""
    from ldm.checkpoint.model import settings_of
    from ldm.diffusion.schedule import Schedule
    from ldm.training.finetuning.base_model import schedule_for

    config = settings_of(place).get("scheduler")
    if config:
        schedule_for(s, Schedule.from_diffusers(dict(config)))


def _check_clip(place: Path) -> None:
    from ldm.checkpoint.folder import T5, read_layout
    from ldm.checkpoint.model import is_single

    if not is_single(place) and read_layout(place, ("vae",)).text_class("text_encoder") in T5:
        raise ConfigError("is for CLIP alone, and this model has T5", where="text_encoder", todo="leave it out")


def require_place(folder: str | Path) -> None:
    """Raise ResourceError, refused before work began, unless a file can be created in `folder`."""
    try:
        require_writable(folder)
    except ResourceError as error:
        error.exit_code = ConfigError.exit_code
        raise


def check_finetune_run(settings: FinetuneSettings, out: Path, pictures: Pictures | None) -> None:
    """As `check_finetune_place`; and ConfigError where the best checkpoint is wanted and no picture would tell it."""
    check_finetune_place(settings.data, out)
    if settings.export == "best" and pictures is not None and not pictures.held_out:
        what = "best is by the validation loss, and no picture is held out"
        raise ConfigError(what, where="export", todo="raise held_out, or use export=last")


def check_finetune_place(data: FinetuneData, out: Path) -> None:
    """Raise ConfigError or ResourceError where the run's folder or the cache's cannot be what they are meant for."""
    require_place(out)
    folder = Path(data.folder)
    if folder.is_dir() and (out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents):
        what = f"lies in {data.folder}, whose pictures are trained on: its own would be among them"
        raise ConfigError(what, where=out, todo="choose another folder for the run")
    if out.is_dir() and not (out / "settings.json").is_file():
        other = [path.name for path in sorted(out.iterdir()) if not path.name.startswith(".") and path.name != "cache"]
        if other:
            raise ConfigError(f"is no run, and holds {other[0]}", where=out, todo="choose a new folder")
    if data.cache != OFF:
        require_place(data.cache or out / "cache")


def _autoencoder_names() -> list[str]:
    from diffusers import AutoencoderKL

    return list(inspect.signature(AutoencoderKL.__init__).parameters)[1:]


def _known_names(given: Iterable[str], known: Iterable[str], where: str) -> None:
    """These libraries take any name without a word, and go on with the default of the one that was meant."""
    known = list(known)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}", where=where, todo=nearest(str(name), known))


def check_same(given: Mapping[str, Any], own: Mapping[str, Any], init: str) -> None:
    """Raise ConfigError where the settings ask for another network than the one that the run starts from."""
    for name, value in given.items():
        have = own[name]
        same = list(value) == list(have) if isinstance(value, (list, tuple)) else value == have
        require(same, f"asks for {value}, but {init} has {have}: leave it out, or leave out init", f"model.{name}")


def model_folder(run: str | Path) -> Path:
    """The diffusers folder that `run` is or holds (`RUN/model`). Raises ModelError where there is none."""
    for folder in (Path(run) / "model", Path(run)):
        if any((folder / part).is_dir() for part in ("vae", "unet", "text_encoder")):
            return folder
    raise ModelError("holds no model", where=run, todo="give a finished run of ldm train, or a diffusers folder")


def fingerprints(settings: Settings) -> dict[str, str]:
    """The sha256 of the manifest of each model that the run reads, by setting; what has no manifest is left out."""
    if isinstance(settings, FinetuneSettings):
        return {}  # its stage knows the hash of all that it loaded
    folders = {name: model_folder(getattr(settings, name)) for name in INPUTS[:2] if getattr(settings, name, None)}
    return {name: sha256(folder / MANIFEST) for name, folder in folders.items() if (folder / MANIFEST).is_file()}
