"""Checkpoints that are read: found, verified, and their state given back to a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint.safety import verify_manifest
from ldm.console import warn
from ldm.errors import CheckpointError, ModelError, first_line
from ldm.file_names import unused_path
from ldm.training.checkpoints.state import (
    ABOUT,
    FORMAT,
    WEIGHTS,
    TrainState,
    checkpoints,
    corrupt,
    trainable,
    trained_names,
)
from ldm.training.distributed.alone import SHARDED

KINDS = {"step": int, "settings": dict, "losses": list, "environment": dict}  # of what state.json has to hold
MORE = {"inputs": dict, "scaler": dict}  # and may hold


def best(run: Path) -> Path:
    """The checkpoint that `best.json` of a run names. Raises CheckpointError if there is none."""
    try:
        return run / json.loads((run / "best.json").read_text())["checkpoint"]
    except (OSError, ValueError, LookupError, TypeError):
        hint = "resume the latest one"
        raise CheckpointError("names no best checkpoint", where=run / "best.json", hint=hint) from None


def newest(run: Path, look: bool = False) -> Path | None:
    """The newest checkpoint that matches its manifest. Damaged ones are renamed `corrupt-…` with a warning.

    With `look` nothing is renamed. Raises CheckpointError when there were checkpoints and none is whole.
    """
    found, lost = checkpoints(run), corrupt(run)
    for folder in reversed(found):
        try:
            verify(folder)
            return folder
        except (CheckpointError, ModelError) as error:
            done = "damaged" if look else f"set aside as {set_aside(folder, 'corrupt')}"
            warn(f"{error}; {done}, trying the one before it")
    if found or lost:
        raise CheckpointError("no checkpoint is whole", where=run, hint="start anew in another folder")
    return None


def set_aside(folder: Path, kind: str) -> str:
    """Rename a checkpoint to KIND-… (KIND-…-2 if that exists) and return its new name."""
    new = unused_path(folder.parent, f"{kind}-{folder.name}", "")
    folder.rename(new)
    return new.name


def verify(folder: Path) -> None:
    """Raise CheckpointError or ModelError unless the files of a checkpoint match its manifest."""
    listed = verify_manifest(folder)
    if missing := [name for name in (WEIGHTS, ABOUT) if name not in listed]:
        what = f"the manifest does not list {missing[0]}" if listed else "has no manifest"
        raise CheckpointError(f"{what}, so nothing vouches for it", where=folder, hint="go on from another checkpoint")


def read_about(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError; for another format it names both versions."""
    hint = "give a folder checkpoints/step-…"
    try:
        about = json.loads((folder / ABOUT).read_text())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError("is no checkpoint of ldm", where=folder, hint=hint) from None
    if not isinstance(about, dict):
        raise CheckpointError("is no checkpoint of ldm", where=folder, hint=hint)
    if about.get("format") != FORMAT:
        raise CheckpointError(f"has format {about.get('format')}, this version reads {FORMAT}", where=folder)
    wrong = [name for name, kind in KINDS.items() if not isinstance(about.get(name), kind)]
    wrong += [name for name, kind in MORE.items() if not isinstance(about.get(name, {}), kind)]
    if wrong:
        raise CheckpointError(f"its {ABOUT} is damaged: {wrong[0]}", where=folder, hint="take another checkpoint")
    return about


def settings_of(run: Path, resume: str) -> dict[str, Any]:
    """The settings of a run that is resumed, {} where there is none yet. Raises CheckpointError."""
    if resume in ("latest", "best"):
        try:
            return dict(json.loads((run / "settings.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}
    if not Path(resume).is_dir():
        raise CheckpointError("no such checkpoint", where=resume, hint="give a folder checkpoints/step-… or 'latest'")
    return read_about(Path(resume))["settings"]


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint. Raises CheckpointError or ModelError if it does not match its manifest."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    verify(folder)
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        hint = "go on from another checkpoint"
        raise CheckpointError(f"cannot be read ({first_line(error)})", where=folder / WEIGHTS, hint=hint) from None


def restore_state(state: TrainState, tensors: Mapping[str, Tensor], step: int) -> None:
    """Restore what `TrainState.tensors` returned. The parameters keep their memory and device.

    Raises CheckpointError if they belong to another network.
    """
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}, "average": {}, "stage": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    needed = trained_names(state.module)
    _load(state.ema, parts["ema"], needed)
    _load(state.module, parts["model"], needed)  # last: with ema=0 they share their memory
    slots: dict[str, dict[str, Tensor]] = {}
    for name, value in parts["optimizer"].items():
        parameter, _, slot = name.rpartition(".")
        slots.setdefault(parameter, {})[slot] = value
    for name, parameter in trainable(state.module).items():
        if name in slots:
            state.optimizer.state[parameter] = {k: _slot(parameter, v) for k, v in slots[name].items()}
    for decay, average in state.averages.items():
        for name, value in average.items():  # one that is new begins as the model is now
            value.copy_(like(parts["average"].get(f"{decay:.9f}/{name}", parts["model"][name]), value))
    for name, value in state.stage.items():
        value.copy_(parts["stage"].get(name, value))
    state.step = step


def load_ema(state: TrainState, tensors: Mapping[str, Tensor]) -> None:
    """Load the average from a checkpoint's tensors."""
    found = {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
    _load(state.ema, found, trained_names(state.module))


def _load(module: nn.Module, given: Mapping[str, Tensor], needed: list[str]) -> None:
    """Load `given` into `module`. An older checkpoint may also hold parameters that are not trained."""
    own = module.state_dict()
    wrong = [name for name in needed if name not in given] + [name for name in given if name not in own]
    wrong += [name for name, value in given.items() if name in own and own[name].shape != value.shape]
    if wrong:
        told = f"{len(wrong)} tensors are not those of this network ({wrong[0]}, …)"
        raise CheckpointError(told, hint="resume with the settings that the run began with")
    module.load_state_dict({n: like(v, own[n]) if n in own else v for n, v in given.items()}, strict=False)


def _slot(parameter: nn.Parameter, value: Tensor) -> Tensor | int:
    """An optimizer's value for a parameter; a moment gets its parameter's layout, as fused optimizers need it."""
    if value.ndim == 0 and not value.is_floating_point():
        return int(value)  # bitsandbytes' count of steps
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    value = like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def like(value: Tensor, own: Tensor) -> Tensor:
    """Shard `value`, which every process has in full, as `own` is sharded."""
    if not hasattr(own, SHARDED):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.to_local().device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
