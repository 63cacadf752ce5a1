"""Resuming: a checkpoint is found, verified and compared before any work, and restored when the run begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.console import say
from ldm.errors import CheckpointError
from ldm.training.checkpoints.reading import (
    best,
    newest,
    read_about,
    read_tensors,
    restore_state,
    set_aside,
    verify,
)
from ldm.training.checkpoints.state import TrainState, checkpoints, corrupt, environment
from ldm.training.loop.optimizers import learning_rate
from ldm.training.settings import Settings, changed, with_new_names

RATE = ("steps", "learning_rate", "lr_schedule", "warmup", "decay_from", "final_lr")
LEAP = 0.02  # of the learning rate, by which it may change without being asked for


def find(settings: Settings, out: Path, resume: str, allow_changed: Sequence[str], look: bool) -> Path | None:
    """The checkpoint that `resume` means, see `to_resume`; None for "latest" in a folder without any."""
    folder = newest(out, look) if resume == "latest" else best(out) if resume == "best" else Path(resume)
    if folder is None:
        return None
    if is_foreign(folder, out) and (checkpoints(out) or corrupt(out)):
        # new checkpoints would be rotated away beside later ones, and "latest" would resume the run that was there
        hint = "go on in a new folder, or with --resume latest"
        raise CheckpointError(f"already holds a run, and {folder} is a checkpoint of another", where=out, hint=hint)
    if not folder.is_dir():
        raise CheckpointError("no such checkpoint", where=folder, hint="give a folder checkpoints/step-… or 'latest'")
    about = read_about(folder)
    if resume != "latest":
        verify(folder)
    differing = {k: v for k, v in changed(about["settings"], settings).items() if k not in allow_changed}
    if differing:
        told = "; ".join(f"{k}: {old} → {new}" for k, (old, new) in differing.items())
        raise CheckpointError(f"settings changed ({told})", where=folder, hint="allow each by --allow-changed NAME")
    _check_rate(about, settings, folder, allow_changed)
    return folder


def is_foreign(folder: Path, out: Path) -> bool:
    """Whether `folder` is no checkpoint of the run in `out`."""
    return folder.parent.resolve() != (out / "checkpoints").resolve()


def _check_rate(about: Mapping[str, Any], settings: Settings, folder: Path, allow_changed: Sequence[str]) -> None:
    """Raise CheckpointError where other settings would make the learning rate leap, and were not allowed to."""
    before = {name: value for name, value in with_new_names(about["settings"]).items() if name in RATE}
    new = {name: getattr(settings, name) for name in before}
    names = [name for name, value in before.items() if value != new[name]]
    if not names:
        return
    old, step = dataclasses.replace(settings, **before), about["step"]
    was, becomes = learning_rate(old, min(step, old.steps)), learning_rate(settings, step)
    told = ", ".join(f"{name} {before[name]} → {new[name]}" for name in names)
    unasked = [name for name in names if name not in allow_changed]
    if unasked and step < settings.steps and abs(becomes - was) > LEAP * was:
        what = f"with {told} the learning rate would go from {was:.3g} to {becomes:.3g} at step {step}"
        allow = " ".join(f"--allow-changed {name}" for name in unasked)
        hint = f"{allow}, or keep the rate: lr_schedule=constant warmup=0 learning_rate={was:.6g}"
        raise CheckpointError(what, where=folder, hint=hint)
    say(f"changed: {told}; the learning rate goes from {was:.3g} to {becomes:.3g}")


def restore(
    state: TrainState, folder: Path, settings: Settings, inputs: Mapping[str, str], allow_changed: Sequence[str]
) -> list[float]:
    """Restore `state`; returns the losses of the steps that are not logged yet.

    Raises CheckpointError if the inputs of the run have changed.
    """
    about = read_about(folder)
    compare_inputs(about.get("inputs", {}), inputs, folder, allow_changed)
    tensors = read_tensors(folder)
    if about["settings"].get("optimizer", "adamw") != settings.optimizer:
        tensors = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
        say(f"{settings.optimizer} begins without moments")
    restore_state(state, tensors, about["step"])
    if state.scaler is not None and "scaler" in about:
        state.scaler.load_state_dict(about["scaler"])
    _tell_differences(about["environment"], next(state.module.parameters()).device)
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
    for later in reversed(checkpoints(out)):
        if later.parent.resolve() == folder.parent.resolve() and later.name > folder.name:
            name = later.name
            say(f"{name} is newer than what is resumed: set aside as {set_aside(later, 'later')}")


def _tell_differences(before: Mapping[str, Any], device: torch.device) -> None:
    """Print what has changed in the environment, because then the weights cannot be bit-identical."""
    now = environment(device)
    told = ", ".join(f"{name} {old} → {now.get(name)}" for name, old in before.items() if old != now.get(name))
    if told:
        say(f"resuming in another environment ({told}): the weights will not be bit-identical")
