"""One stage of training with its settings: checked, resumed or begun in its folder, and trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ldm import files
from ldm.training.distributed import current
from ldm.training.settings import DistillSettings, FinetuneSettings, Settings, as_dict

if TYPE_CHECKING:
    from ldm.training.data import DrawnSet, ImageSet, PreparedSet, SceneSet


def run(
    settings: Settings,
    out: Path,
    resume: str | None,
    allow_changed: Sequence[str],
    dry_run: bool,
    images: ImageSet | PreparedSet | SceneSet | DrawnSet,
) -> Path:
    """Train one stage, as `train` and `finetune` do; `images` are what it is trained on. Returns what they return."""
    group = current()
    if group.world > 1:
        from ldm.training.distributed.checks import check_lock, check_processes, check_same_settings

        group.on_all(lambda: check_processes(settings))
        check_same_settings(settings, out)
    with ExitStack() as stack:
        folder = group.on_first(partial(_begin, stack, settings, out, resume, allow_changed, dry_run))
        checkpoint = Path(folder) if folder else None
        if dry_run:
            from ldm.training.dry_run import print_dry_run

            group.on_first(partial(print_dry_run, settings, out, images, checkpoint))
            return out / "model"
        from ldm.training.loop.loop import fit

        if group.world > 1:
            group.on_all(lambda: check_lock(out))
        if settings.stage != "finetune":
            from ldm.training.data.samples import lost_workers

            stack.enter_context(lost_workers(out))
        module = import_module(f"ldm.training.stages.{settings.module}")  # imports no more than its stage needs
        stage = group.on_all(lambda: module.open_stage(settings, out, images))
        return fit(stage, settings, out, checkpoint, allow_changed)


def _begin(
    stack: ExitStack, settings: Settings, out: Path, resume: str | None, allow_changed: Sequence[str], dry_run: bool
) -> str | None:
    """Check the run, lock its folder (until `stack` ends) and return the checkpoint to resume from, if any.

    Where the folder has no settings yet they are written: what is interrupted from here on can be resumed.
    """
    from ldm.training.checkpoints.state import check_new
    from ldm.training.loop.step import check_means

    check_means(settings)
    if isinstance(settings, FinetuneSettings):
        from ldm.training.finetuning.checks import check_finetune as check
    elif isinstance(settings, DistillSettings):
        from ldm.training.checks import check_distill as check
    else:
        from ldm.training.checks import check_stage as check
    check(settings)
    files.require_place(out)
    if not dry_run:
        stack.enter_context(files.Lock(out))
    checkpoint = None
    if resume is None and not allow_changed:
        check_new(out, look=dry_run)
    else:
        from ldm.training.checkpoints.begin import to_resume

        checkpoint = to_resume(settings, out, resume, allow_changed, look=dry_run)
    path = out / "settings.json"
    if not dry_run and (checkpoint is None or not path.exists()):
        files.atomic_write(path, json.dumps(as_dict(settings), indent=1) + "\n")
    return checkpoint and str(checkpoint)
