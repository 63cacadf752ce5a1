"""`ldm.train`: the settings of one stage are read, and the trainer runs them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import DataError
from ldm.training.distributed import processes
from ldm.training.run import run
from ldm.training.settings import (
    OFF,
    ControlSettings,
    DistillSettings,
    FinetuneSettings,
    Settings,
    TextSettings,
    UNetSettings,
    check_file_name,
    read_settings,
)

if TYPE_CHECKING:
    from ldm.training.data import DrawnSet, ImageSet, PreparedSet, SceneSet

OPTION = re.compile(r"--(layout|split|exclude) ")
# What a stage decides of its images: some compare images of one size, and captions, of which none may be dropped.
NEEDED: dict[str, dict[str, Any]] = {
    "autoencoder": {"square": True, "cache": OFF},
    "text": {"square": True, "caption_dropout": 0.0},
    "distill": {"caption_dropout": 0.0},
}


def train(
    config: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Run one training stage and return the folder of its model, `out/model`.

    `config` is a packaged name (emoji/autoencoder, emoji/text, emoji/unet, emoji/small, emoji/edges, …) or a
    settings file; `overrides` are KEY=VALUE strings; `resume` is None, "latest", "best" or a checkpoint's folder;
    `allow_changed` names settings that may differ from those of the run that is resumed. With `dry_run` the settings
    are only checked and printed. Raises LdmError for bad settings before any work, Interrupted after a signal (state
    saved), NumericsError when the loss stays non-finite, ProcessGone where torchrun started several processes for it
    and one of them is missing.
    """
    with processes() as group:
        settings = group.on_all(lambda: read_settings(config, overrides))
        if isinstance(settings, (TextSettings, UNetSettings)):
            from ldm.training.parts import pinned_names

            settings = replace(settings, **group.on_first(partial(pinned_names, settings)))
        images = group.on_all(lambda: open_images(settings, Path(out)))
        return run(settings, Path(out), resume, allow_changed, dry_run, images)


def open_images(settings: Settings, out: Path) -> ImageSet | PreparedSet | SceneSet | DrawnSet:
    """What the stage is trained on, counted and checked. Raises DataError, ConfigError."""
    from ldm.data.sources.walk import is_prepared
    from ldm.training.data import PreparedSet, SceneSet, read_images, read_prompts, read_training_images
    from ldm.training.data.conditions import with_conditions
    from ldm.training.data.images import with_prior
    from ldm.training.finetuning.checks import check_export, check_run_folder

    if isinstance(settings, ControlSettings) and not settings.data.folder:
        return SceneSet.of(settings, settings.data)
    if isinstance(settings, FinetuneSettings):
        names_file = settings.train in ("lora", "dora") and not settings.name
        check_run_folder(settings.data, out, names_file)
        images = read_training_images(settings.data)
        images = with_prior(images, settings.prior) if settings.prior else images
        if settings.control is not None:
            images = with_conditions(images, settings.control)
        check_export(settings, images)
        return images
    if isinstance(settings, DistillSettings) and settings.train == "lora" and not settings.name:
        check_file_name(out.resolve().name, "out")
    data = replace(settings.data, **NEEDED.get(settings.stage, {}))
    if isinstance(settings, DistillSettings) and settings.prompts:
        return read_prompts(settings.prompts, settings.drawn, data)
    if not data.folder:
        return SceneSet.of(settings, data)
    check_run_folder(data, out, names_file=False)
    if is_prepared(data.folder):
        return PreparedSet(data)
    try:
        return read_images(data)
    except DataError as error:
        if error.hint:  # an option of the other commands is a setting here
            error = DataError(error.what, where=error.where, hint=OPTION.sub(r"data.\1=", error.hint))
        raise error from None
