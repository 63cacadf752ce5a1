"""`ldm.train`: the settings of one stage are read, and the trainer runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.training.distributed import processes
from ldm.training.run import run
from ldm.training.settings import FinetuneSettings, TextSettings, UNetSettings, read_settings

if TYPE_CHECKING:
    from ldm.training.data import ImageSet


def train(
    config: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Run one training stage and return the folder of its model, `out/model`.

    `config` is a packaged name (emoji/autoencoder, emoji/text, emoji/unet, emoji/small) or a settings file;
    `overrides` are KEY=VALUE strings; `resume` is None, "latest", "best" or a checkpoint's folder; `allow_changed`
    names settings that may differ from those of the run that is resumed. With `dry_run` the settings are only checked
    and printed. Raises LdmError for bad settings before any work, Interrupted after a signal (state saved),
    NumericsError when the loss stays non-finite, ProcessGone where torchrun started several processes for it and one of
    them is missing.
    """
    with processes() as group:
        settings = group.on_all(lambda: read_settings(config, overrides))
        images = None
        if isinstance(settings, (TextSettings, UNetSettings)):
            from ldm.training.parts import pinned_names

            settings = replace(settings, **group.on_first(partial(pinned_names, settings)))
        if isinstance(settings, FinetuneSettings):
            images = group.on_all(lambda: _read_images(settings, Path(out)))
        return run(settings, Path(out), resume, allow_changed, dry_run, images)


def _read_images(settings: FinetuneSettings, out: Path) -> ImageSet:
    from ldm.training.data import read_training_images
    from ldm.training.finetuning.checks import check_export, check_run_folder

    check_run_folder(settings.data, out, settings.train != "full" and not settings.name)
    images = read_training_images(settings.data, settings.data.for_prior(settings.prior) if settings.prior else None)
    check_export(settings, images)
    return images
