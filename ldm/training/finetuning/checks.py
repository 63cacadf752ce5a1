"""The checks of a fine-tuning before any work: its folder, its model, the LoRA that it continues."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from ldm.checkpoint.lora import target_at
from ldm.device import pick_device
from ldm.diffusion import names
from ldm.errors import ConfigError, ModelError
from ldm.files import require_place
from ldm.nn.attention import check_backend
from ldm.training.data import ImageSet
from ldm.training.finetuning.base_model import asked_prediction, chosen_layers, describe_base, schedule_for
from ldm.training.finetuning.continued import check_init
from ldm.training.finetuning.controlnet import check_controlnet
from ldm.training.finetuning.memory import check_memory
from ldm.training.settings import OFF, FinetuneData, FinetuneSettings, check_file_name


def check_finetune(s: FinetuneSettings) -> None:
    """What is known without a weight: of the model, the LoRA to continue, the machine."""

    pick_device(s.device)
    check_backend(s.attention)
    if s.sampler is not None:
        names.resolve(s.sampler)
    prediction_type = asked_prediction(s)
    info = describe_base(s, prediction_type)
    if (takes := info.unet.in_channels) != (gives := info.unet.out_channels):
        what = f"its network takes {takes} channels, and gives {gives}: an inpainting model, perhaps"
        raise ModelError(what, where=s.model, hint="fine-tune a text-to-image model")
    if info.transformer and s.data.buckets.step % info.multiple:
        what = f"{s.data.buckets.step} is no multiple of {info.multiple}, as the sides of this model's images are"
        raise ConfigError(what, where="bucket_step", hint=f"set bucket_step={info.multiple}, or a multiple of it")
    schedule_for(s, info.schedule)
    if prediction_type is not None and s.train != "full":
        with suppress(ModelError):  # a single file that does not tell its own
            schedule_for(s, describe_base(s).schedule)
    if s.text_encoder and (info.transformer or not info.clip_layers):
        has = "is a flow transformer, whose text encoders stay as they are" if info.transformer else "has T5"
        raise ConfigError(f"is for CLIP alone, and this model {has}", where="text_encoder", hint="leave it out")
    if s.train == "control":
        check_controlnet(s, info)
        return
    target = target_at(s.model, prediction_type, s.text_encoders)
    if s.init is not None:
        check_init(s, target)
    elif s.train != "full" and target is not None:
        shapes = {part: layers for part, layers in target.shapes.items() if s.text_encoder or part == "unet"}
        chosen_layers(shapes, s.targets, s.lora_rank)
    if info.transformer:
        check_memory(s, pick_device(s.device))


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
