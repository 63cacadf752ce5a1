"""Images that a model draws before it is fine-tuned, so that it keeps what it knows (Ruiz et al. 2023)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ldm import files
from ldm.checkpoint import Model
from ldm.console import hushed, progress, say
from ldm.data.emoji import SceneConfig, Scenes
from ldm.device import pick_dtype
from ldm.nn.lora import clone_shared_weights
from ldm.pipeline import Pipeline
from ldm.prompts import parse
from ldm.training.data import ImageSet, read_images
from ldm.training.distributed import current
from ldm.training.finetuning.base_model import read_base
from ldm.training.settings import FinetuneSettings

BATCH = 32  # images of a call


def read_prior(settings: FinetuneSettings, model: Model, out: Path) -> ImageSet:
    """The images of `draw_prior` in `out`/prior, read and counted. Raises ModelError, ResourceError, DataError."""
    current().on_first(lambda: str(draw_prior(settings, model, out / "prior")))
    return read_images(dataclasses.replace(settings.data.for_prior(str(out / "prior")), captions="auto"))


def draw_prior(settings: FinetuneSettings, model: Model, folder: Path) -> Path:
    """`folder` with `settings.prior_images` images and their captions, drawn by `model`, which is to be trained.

    They show `prior_prompt`; without one the default model draws what it was trained on, everyday objects above all.
    Raises ModelError, ResourceError.
    """
    return draw_images(settings, model, _prompts(settings), folder)


def draw_images(
    settings: FinetuneSettings,
    model: Model,
    prompts: list[str],
    folder: Path,
    how: Mapping[str, Any] = MappingProxyType({}),
    inputs: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """`folder` with an image of each prompt and its caption, drawn by `model` in the resolution of the settings.

    `how`: settings of generate in place of the model's own. `inputs`: the sha256 of what `model` was changed by, by
    name. FOLDER.json beside the folder says what the images were drawn from: a folder of the same model, prompts, seed,
    size and settings is left as it is, any other is drawn again. Raises ModelError, ResourceError.
    """
    count = len(prompts)
    origin, path = {**_origin(settings, model, prompts), **how, **inputs}, folder.with_name(f"{folder.name}.json")
    if len(list(folder.glob("*.png"))) == count and _read(path) == origin:
        return folder
    path.unlink(missing_ok=True)
    say(f"drawing {count} images of what the model knows into {folder}")
    model = _in_drawing_dtype(settings, model)
    with files.atomic_folder(folder) as tmp, progress(total=count, desc="drawing", unit="image") as bar:
        for start in range(0, count, BATCH):
            batch = prompts[start : start + BATCH]
            seeds = [settings.seed + start + i for i in range(len(batch))]
            with hushed():
                size = settings.data.resolution
                images = Pipeline(batch, model=model).generate(seed=seeds, height=size, width=size, **how)
            for i, (prompt, image) in enumerate(zip(batch, images), start):
                image.save(tmp / f"{i:05d}.png")
                (tmp / f"{i:05d}.txt").write_text(_words(prompt) + "\n", encoding="utf-8")
            bar.update(len(batch))
    files.atomic_write(path, json.dumps(origin, indent=1) + "\n")
    return folder


def _words(prompt: str) -> str:
    """The caption of what a prompt draws: without its weights."""
    return " ".join("".join(piece.text for piece in parse(prompt)).split())


def _origin(settings: FinetuneSettings, model: Model, prompts: list[str]) -> dict[str, Any]:
    """What determines the images, on whichever device they are drawn."""
    return {
        "model": model.hash,
        "prediction_type": model.schedule.prediction_type,
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "seed": settings.seed,
        "resolution": settings.data.resolution,
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _in_drawing_dtype(settings: FinetuneSettings, model: Model) -> Model:
    """The model as it draws: `model` itself in fp32; on a GPU read again in 16 bits, which is several times as fast,
    with the weights that the network of `model` has now."""
    dtype = pick_dtype("auto", model.device)
    if dtype == torch.float32:
        return dataclasses.replace(model, unet=clone_shared_weights(model.unet))
    other = read_base(settings, model.device, dtype)
    other.unet.load_state_dict(model.unet.state_dict())
    return other


def _prompts(settings: FinetuneSettings) -> list[str]:
    if settings.prior_prompt is not None:
        return [settings.prior_prompt] * settings.prior_images
    scenes = Scenes(SceneConfig(objects="all", everyday_share=0.7, mention=1.0), settings.seed)
    return [scenes.caption(i) for i in range(settings.prior_images)]
