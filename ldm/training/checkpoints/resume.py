"""Resuming: the checkpoint is found, verified and compared before any work, and restored when the run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm import files
from ldm.checkpoint.lora.read import FILE
from ldm.console import say
from ldm.errors import CheckpointError, ConfigError, nearest
from ldm.training.checkpoints import state as states
from ldm.training.checkpoints.state import TrainState
from ldm.training.settings import FinetuneSettings, Settings, changed

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
    if not look:
        for folder in (out, out / "checkpoints", out / "samples"):
            files.sweep(folder)
    if resume is None and (states.checkpoints(out) or states.corrupt(out)):
        raise CheckpointError("already holds a run", where=out, hint="go on with --resume, or choose another folder")
    if resume is None:
        _check_unfinished(out)
        return None
    folder = states.newest(out, look) if resume == "latest" else states.best(out) if resume == "best" else Path(resume)
    if folder is None:
        _check_unfinished(out)
        say(f"{out}: nothing to resume, starting from the beginning")
        return None
    _check_own(folder, out)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint", where=folder, hint="give a folder checkpoints/step-… or 'latest'")
    about = states.read_about(folder)
    if resume != "latest":
        states.verify(folder)
    differing = {k: v for k, v in changed(about["settings"], settings).items() if k not in allow_changed}
    if differing:
        told = "; ".join(f"{k}: {old} → {new}" for k, (old, new) in differing.items())
        raise CheckpointError(f"settings changed ({told})", where=folder, hint="allow each by --allow-changed NAME")
    return folder


def _check_own(folder: Path, out: Path) -> None:
    """Raise CheckpointError where `folder` is another run's checkpoint and `out` holds a run too.

    The new checkpoints would be rotated away beside later ones, and "latest" would resume the run that was there.
    """
    if folder.parent.resolve() == (out / "checkpoints").resolve():
        return
    if states.checkpoints(out) or states.corrupt(out):
        hint = "go on in a new folder, or with --resume latest"
        raise CheckpointError(f"already holds a run, and {folder} is a checkpoint of another", where=out, hint=hint)
    _check_unfinished(out)


def _check_names(settings: Settings, allow_changed: Sequence[str]) -> None:
    """Raise ConfigError for a name that is neither a setting nor an input of the run."""
    known = [*(field.name for field in dataclasses.fields(settings)), *READ]
    for name in allow_changed:
        if name not in known:
            if isinstance(settings, FinetuneSettings):  # where each of data's is a word for `data`
                known += [field.name for field in dataclasses.fields(settings.data)]
            raise ConfigError(f"unknown setting {name!r}", where="allow_changed", hint=nearest(name, known))


def _check_unfinished(out: Path) -> None:
    """Raise CheckpointError if `out` holds a finished model without checkpoints: it would be overwritten."""
    found = [name for name in ("model", FILE) if (out / name).exists()]
    if found and (out / "settings.json").exists():
        told = f"already holds a run that is finished ({found[0]}), and no checkpoint to go on from"
        raise CheckpointError(told, where=out, hint="choose another folder")


def restore(
    state: TrainState, folder: Path, settings: Settings, inputs: Mapping[str, str], allow_changed: Sequence[str]
) -> list[float]:
    """Restore `state`; returns the losses of the steps that are not logged yet.

    Raises CheckpointError if the inputs of the run have changed.
    """
    about = states.read_about(folder)
    compare_inputs(about.get("inputs", {}), inputs, folder, allow_changed)
    tensors = states.read_tensors(folder)
    if about["settings"].get("optimizer", "adamw") != settings.optimizer:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        say(f"{settings.optimizer} begins without moments")
    state.restore(tensors, about["step"])
    if state.scaler is not None and "scaler" in about:
        state.scaler.load_state_dict(about["scaler"])
    states.tell_differences(about["environment"], next(state.module.parameters()).device)
    say(f"resuming {folder.name}")
    return about["losses"]


def compare_inputs(
    before: Mapping[str, str], inputs: Mapping[str, str], folder: Path, allow_changed: Sequence[str]
) -> None:
    """Raise CheckpointError for an input (name -> digest) that is not the one that the run began with."""
    for name, digest in before.items():
        if inputs.get(name) != digest and name not in allow_changed:
            told = f"the {name} is not the one that this run began with"
            raise CheckpointError(told, where=folder, hint=f"put that one back, or --allow-changed {name}")


def set_later_aside(out: Path, folder: Path) -> None:
    """Rename the checkpoints of the run that are newer than the resumed one, the newest first."""
    for later in reversed(states.checkpoints(out)):
        if later.parent.resolve() == folder.parent.resolve() and later.name > folder.name:
            name = later.name
            say(f"{name} is newer than what is resumed: set aside as {states.set_aside(later, 'later')}")
