"""Training: one loop, its exact state, and the stages autoencoder, text, U-Net and fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.training.finetuning.command import finetune
from ldm.training.settings import FinetuneSettings, Settings, packaged_configs, read_settings

if TYPE_CHECKING:
    from ldm.training.data import Pictures

__all__ = ["finetune", "packaged_configs", "read_settings", "train"]


def train(
    config: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    allow_changed: Sequence[str] = (),
    dry_run: bool = False,
) -> Path:
    """Run one training stage and return the folder of its model, `out/model`.

    Everything that can be said against the run is said before work begins; `dry_run` stops there.

    `config` is a packaged name (emoji/autoencoder, emoji/text, emoji/unet, emoji/small) or a settings file;
    `overrides` are KEY=VALUE strings; `resume` is None, "latest" or a checkpoint's folder; `allow_changed` names
    settings that may differ from those of the run that is resumed. Raises LdmError for bad settings before any work,
    Interrupted after a signal (state saved), NumericsError when the loss stays non-finite, ProcessGone where torchrun
    started several processes for it and one of them is missing.
    """
    from ldm.training.distributed import processes

    with processes() as group:
        settings = group.together(lambda: read_settings(config, overrides))
        return run(settings, Path(out), resume, allow_changed, dry_run)


def run(
    settings: Settings,
    out: Path,
    resume: str | None,
    allow_changed: Sequence[str],
    dry_run: bool,
    pictures: Pictures | None = None,
) -> Path:
    """One stage under complete settings, as `train` has it; `pictures`: what was read of fine-tuning's data before."""
    from contextlib import ExitStack

    from ldm import files
    from ldm.training.checks import check, check_finetune_run, check_lock, check_processes, require_place
    from ldm.training.distributed import current

    group = current()
    with ExitStack() as held:

        def begin() -> str | None:
            check(settings)
            if isinstance(settings, FinetuneSettings):
                check_finetune_run(settings, out, pictures)
            require_place(out)
            if not dry_run:
                held.enter_context(files.Lock(out))
            from ldm.training.checkpoints.resume import to_resume

            found = to_resume(settings, out, resume, allow_changed, look=dry_run)
            if dry_run:
                return str(_dry_run(settings, out, pictures, found))
            return found and str(found)

        group.together(lambda: check_processes(settings))
        found = group.on_first(begin)
        if dry_run:
            return Path(found)
        from ldm.training.data.samples import lost_workers
        from ldm.training.loop.loop import fit
        from ldm.training.stages import STAGES

        group.together(lambda: check_lock(out))
        held.enter_context(lost_workers(out))
        stage = group.together(lambda: STAGES[settings.stage](settings, out, pictures))
        return fit(stage, settings, out, found and Path(found), allow_changed)


def _dry_run(settings: Settings, out: Path, pictures: Pictures | None, checkpoint: Path | None) -> Path:
    """Say what would be done, from `checkpoint` on where there is one."""
    from ldm.console import say
    from ldm.training.checkpoints.state import read_about
    from ldm.training.finetuning.options import flattened
    from ldm.training.settings import as_dict

    done = read_about(checkpoint)["step"] if checkpoint else 0
    if checkpoint:
        say(f"would go on from {checkpoint.name}: {max(0, settings.steps - done)} of {settings.steps} steps are left")
    if isinstance(settings, FinetuneSettings):
        from dataclasses import replace

        from ldm.training.finetuning.forecast import measure

        left = replace(settings, steps=max(1, settings.steps - done))
        lines = list(measure(left, out, pictures).lines if done < settings.steps else ())
    else:
        lines = []
    told = [f"{name}: {value}" for name, value in flattened(as_dict(settings)).items()]
    say("\n".join([*told, *lines]))
    return out / "model"
