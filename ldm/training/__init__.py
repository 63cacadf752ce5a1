"""Training: one loop, its exact state, and the stages autoencoder, text and U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.training.settings import packaged_configs, read_settings

__all__ = ["packaged_configs", "read_settings", "train"]


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

    `config` is a packaged name (emoji/autoencoder, emoji/text, emoji/unet) or a settings file; `overrides` are
    KEY=VALUE strings; `resume` is None, "latest" or a checkpoint's folder; `allow_changed` names settings that may
    differ from those of the run that is resumed. Raises LdmError for bad settings before any work, Interrupted after
    a signal (state saved), NumericsError when the loss stays non-finite.
    """
    from ldm import files
    from ldm.console import say
    from ldm.training.checks import check

    settings, out = read_settings(config, overrides), Path(out)
    check(settings)
    if dry_run:
        from ldm.training.settings import as_dict

        say("\n".join(f"{name}: {value}" for name, value in as_dict(settings).items()))
        return out / "model"
    files.require_writable(out)
    with files.Lock(out):
        from ldm.training.loop import fit, to_resume
        from ldm.training.stages import STAGES

        checkpoint = to_resume(settings, out, resume, allow_changed)
        stage = STAGES[settings.stage](settings)
        return fit(stage, settings, out, checkpoint, allow_changed)
