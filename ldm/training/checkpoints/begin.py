"""The checkpoint that a run goes on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ldm.console import say
from ldm.errors import ConfigError, nearest
from ldm.training.checkpoints import resume as resuming
from ldm.training.checkpoints.state import check_new, check_unfinished, sweep
from ldm.training.settings import FinetuneSettings, Settings

READ = ("model", "data", "prior", "init", "tokenizer")  # what has a digest, of which some is no setting


def to_resume(
    settings: Settings, out: Path, resume: str | None, allow_changed: Sequence[str], look: bool = False
) -> Path | None:
    """The checkpoint to resume, its settings compared. `resume`: None, "latest", "best" or a checkpoint's folder.

    With `look` nothing is renamed or removed. Raises CheckpointError if the folder holds another run, or the
    checkpoint is damaged or has other settings; ModelError if its files do not match their manifest; ConfigError for
    an unknown name in `allow_changed`.
    """
    _check_names(settings, allow_changed)
    if resume is None:
        check_new(out, look)
        return None
    if not look:
        sweep(out)
    folder = resuming.find(settings, out, resume, allow_changed, look)
    if folder is None or resuming.is_foreign(folder, out):
        check_unfinished(out)
    if folder is None:
        say(f"{out}: nothing to resume, starting from the beginning")
    return folder


def _check_names(settings: Settings, allow_changed: Sequence[str]) -> None:
    """Raise ConfigError for a name that is neither a setting nor an input of the run."""
    known = [*(field.name for field in dataclasses.fields(settings)), *READ]
    for name in allow_changed:
        if name not in known:
            if isinstance(settings, FinetuneSettings):  # where each of data's is a word for `data`
                known += [field.name for field in dataclasses.fields(settings.data)]
            raise ConfigError(f"unknown setting {name!r}", where="allow_changed", hint=nearest(name, known))
