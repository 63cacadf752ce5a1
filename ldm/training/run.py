"""One stage of training with its settings: checked, resumed or begun in its folder, and trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import files
from ldm.console import say
from ldm.training.distributed import current, processes
from ldm.training.settings import FinetuneSettings, Settings, as_dict, read_settings

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


def run(
    settings: Settings,
    out: Path,
    resume: str | None,
    allow_changed: Sequence[str],
    dry_run: bool,
    images: ImageSet | None = None,
) -> Path:
    """Train one stage, as `train` and `finetune` do; `images` are those of a fine-tuning. Returns what they return."""
    group = current()
    if group.world > 1:
        from ldm.training.distributed.checks import check_lock, check_processes, check_same_settings

        group.on_all(lambda: check_processes(settings))
        check_same_settings(settings, out)
    with ExitStack() as stack:
        folder = group.on_first(partial(_begin, stack, settings, out, resume, allow_changed, dry_run))
        checkpoint = Path(folder) if folder else None
        if dry_run:
            group.on_first(partial(_print_dry_run, settings, out, images, checkpoint))
            return out / "model"
        from ldm.training.loop.loop import fit
        from ldm.training.stages import STAGES

        if group.world > 1:
            group.on_all(lambda: check_lock(out))
        if not isinstance(settings, FinetuneSettings):
            from ldm.training.data.samples import lost_workers

            stack.enter_context(lost_workers(out))
        stage = group.on_all(lambda: STAGES[settings.stage](settings, out, images))
        return fit(stage, settings, out, checkpoint, allow_changed)


def _begin(
    stack: ExitStack, settings: Settings, out: Path, resume: str | None, allow_changed: Sequence[str], dry_run: bool
) -> str | None:
    """Check the run, lock its folder (until `stack` ends) and return the checkpoint to resume from, if any.

    Where the folder has no settings yet they are written: what is interrupted from here on can be resumed.
    """
    from ldm.training.checkpoints.resume import to_resume
    from ldm.training.loop.step import check_means

    check_means(settings)
    if isinstance(settings, FinetuneSettings):
        from ldm.training.finetuning.checks import check_finetune as check
    else:
        from ldm.training.checks import check_stage as check
    check(settings)
    files.require_place(out)
    if not dry_run:
        stack.enter_context(files.Lock(out))
    checkpoint = to_resume(settings, out, resume, allow_changed, look=dry_run)
    path = out / "settings.json"
    if not dry_run and (checkpoint is None or not path.exists()):
        files.atomic_write(path, json.dumps(as_dict(settings), indent=1) + "\n")
    return checkpoint and str(checkpoint)


def _print_dry_run(settings: Settings, out: Path, images: ImageSet | None, checkpoint: Path | None) -> None:
    """Print the settings and, of a fine-tuning, what its remaining steps would take."""
    from ldm.training.checkpoints.state import read_about
    from ldm.training.finetuning.forecast import measure
    from ldm.training.finetuning.options import flatten

    done = read_about(checkpoint)["step"] if checkpoint else 0
    if checkpoint:
        say(f"would resume {checkpoint.name}: {max(0, settings.steps - done)} of {settings.steps} steps are left")
    lines = [f"{name}: {value}" for name, value in flatten(as_dict(settings)).items()]
    if isinstance(settings, FinetuneSettings) and done < settings.steps:
        lines += measure(replace(settings, steps=settings.steps - done), out, images).lines
    say("\n".join(lines))
