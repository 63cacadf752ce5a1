"""The exact state of a run on disk: weights, EMA, optimizer and step. It is written whole or not at all."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import files
from ldm.console import say, warn
from ldm.errors import CheckpointError, ModelError, NumericsError, ResourceError, first_line
from ldm.training.distributed import current
from ldm.training.distributed.single import Single, like, whole

FORMAT = 1
WEIGHTS, ABOUT = "state.safetensors", "state.json"


@dataclass
class TrainState:
    """What a step changes. Random draws are keyed by the step (see loop/seeded.py), so they need no state.

    `ema` has the names of `module` and may share with it what is not trained.
    """

    module: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps done
    scaler: torch.amp.GradScaler | None = None
    parallel: Single = field(default_factory=Single)  # how its processes train it together

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name: trained parameters, buffers, their average, moments.

        With several processes every one has to call it; the first one gets the tensors.
        """
        found, names = {}, trained_names(self.module)
        for part, module in (("model", self.module), ("ema", self.ema)):
            own = module.state_dict()
            found |= {f"{part}.{name}": own[name] for name in names}
        for name, parameter in trainable(self.module).items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{slot}"] = torch.as_tensor(value)
        first, kept = self.parallel.group.first, {}
        for name, value in found.items():
            value = whole(value.detach())
            if first:
                kept[name] = value.to("cpu").contiguous()
        return _unshared(kept)

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Restore what `tensors` returned. The parameters keep their memory and device.

        Raises CheckpointError if they belong to another network.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        needed = trained_names(self.module)
        _load(self.module, parts["model"], needed)
        _load(self.ema, parts["ema"], needed)
        slots: dict[str, dict[str, Tensor]] = {}
        for name, value in parts["optimizer"].items():
            parameter, _, slot = name.rpartition(".")
            slots.setdefault(parameter, {})[slot] = value
        for name, parameter in trainable(self.module).items():
            if name in slots:
                self.optimizer.state[parameter] = {k: _slot(parameter, v) for k, v in slots[name].items()}
        self.step = step

    def load_ema(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the average from a checkpoint's tensors."""
        found = {name.removeprefix("ema."): value for name, value in tensors.items() if name.startswith("ema.")}
        _load(self.ema, found, trained_names(self.module))


def trained_names(module: nn.Module) -> list[str]:
    """The names in the state_dict of trained parameters and buffers."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return [name for name in module.state_dict() if name not in frozen]


def _load(module: nn.Module, given: Mapping[str, Tensor], needed: list[str]) -> None:
    """Load `given` into `module`. An older checkpoint may also hold parameters that are not trained."""
    own = module.state_dict()
    wrong = [name for name in needed if name not in given] + [name for name in given if name not in own]
    wrong += [name for name, value in given.items() if name in own and own[name].shape != value.shape]
    if wrong:
        told = f"{len(wrong)} tensors are not those of this network ({wrong[0]}, …)"
        raise CheckpointError(told, hint="resume with the settings that the run began with")
    module.load_state_dict({n: like(v, own[n]) if n in own else v for n, v in given.items()}, strict=False)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory (8-bit optimizers share their tables): safetensors refuses them."""
    seen: set[int] = set()
    for name, value in tensors.items():
        if value.numel() and value.data_ptr() in seen:
            tensors[name] = value.clone()
        seen.add(value.data_ptr())
    return tensors


def _slot(parameter: nn.Parameter, value: Tensor) -> Tensor | int:
    """An optimizer's value for a parameter; a moment gets its parameter's layout, as fused optimizers need it."""
    if value.ndim == 0 and not value.is_floating_point():
        return int(value)  # bitsandbytes' count of steps
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    value = like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on besides its settings."""
    where = platform.machine(), torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        where = "cuda", torch.cuda.get_device_name(device)
    threads, world = torch.get_num_threads(), current().world
    return {"torch": torch.__version__, "threads": threads, "machine": " ".join(where), "processes": world}


def save(state: TrainState, run: Path, settings: dict[str, Any], extra: Mapping[str, Any] = {}) -> Path:
    """Write `checkpoints/step-N` and read it back against its manifest; of many processes the first one does."""
    tensors, group = state.tensors(), state.parallel.group
    return Path(group.on_first(lambda: str(_write(state, tensors, run, settings, extra))))


def _write(
    state: TrainState, tensors: dict[str, Tensor], run: Path, settings: dict[str, Any], extra: Mapping[str, Any]
) -> Path:
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        hint = f"lower learning_rate; {last_good(run)}"
        raise NumericsError(f"{len(bad)} tensors are not finite ({bad[0]}, …): not saved", where=run, hint=hint)
    folder, size = run / "checkpoints" / f"step-{state.step:08d}", sum(v.nbytes for v in tensors.values())
    files.require_space(run, int(1.2 * size))
    about = {"format": FORMAT, "step": state.step, "settings": settings, **extra}
    if state.scaler is not None:
        about["scaler"] = state.scaler.state_dict()
    about["environment"] = environment(next(state.module.parameters()).device)
    with _room_told(folder, size), files.atomic_folder(folder) as tmp:
        _write_tensors(tensors, tmp / WEIGHTS)
        (tmp / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        files.write_manifest(tmp)
    files.verify_manifest(folder)
    return folder


@contextmanager
def _room_told(folder: Path, size: int) -> Iterator[None]:
    """Add to a disk error how much space is needed and free, and which checkpoint is good."""
    try:
        yield
    except ResourceError as error:
        free = shutil.disk_usage(folder.parent if folder.parent.is_dir() else folder.parents[1]).free
        what = f"{error.what}: {size} bytes are needed, {free} are free on the disk"
        hint = "; ".join(filter(None, (error.hint, last_good(folder.parents[1]))))
        raise ResourceError(what, where=folder, hint=hint) from None


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """`save_file`, but raising the operating system's error."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(first_line(error)) from None
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def last_good(run: Path) -> str:
    """A phrase about the last good checkpoint."""
    found = checkpoints(run)
    return f"the last checkpoint is good ({found[-1].name})" if found else "there is no checkpoint yet"


def saving_seconds(run: Path, size: int) -> float:
    """Seconds to save a checkpoint of `size` bytes, measured with up to 32 MB: written, synced and read twice."""
    data = os.urandom(min(size, 1 << 25))
    path, began = run / "checkpoints" / f".tmp-{os.getpid()}-probe", time.monotonic()
    files.atomic_write(path, data)
    for _ in ("for the manifest", "against it"):
        files.sha256(path)
    path.unlink()
    return (time.monotonic() - began) * size / max(1, len(data))


def rotate(run: Path, keep: int, best: int | None) -> list[Path]:
    """Remove all checkpoints but the newest `keep` and that of step `best`; returns those that cannot be removed."""
    old = [folder for folder in checkpoints(run)[:-keep] if step_of(folder) != best]
    for folder in old:
        shutil.rmtree(folder, ignore_errors=True)
    return [folder for folder in old if folder.exists()]


def set_aside(folder: Path, kind: str) -> str:
    """Rename a checkpoint to KIND-… (KIND-…-2 if that exists) and return its new name."""
    new = files.unused_path(folder.parent, f"{kind}-{folder.name}", "")
    folder.rename(new)
    return new.name


def step_of(checkpoint: Path) -> int:
    """The step that a folder `step-N` was saved after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal())


def best(run: Path) -> Path:
    """The checkpoint that `best.json` of a run names. Raises CheckpointError if there is none."""
    try:
        return run / json.loads((run / "best.json").read_text())["checkpoint"]
    except (OSError, ValueError, LookupError, TypeError):
        hint = "resume the latest one"
        raise CheckpointError("names no best checkpoint", where=run / "best.json", hint=hint) from None


def corrupt(run: Path) -> list[Path]:
    """The checkpoints of a run that were found to be damaged."""
    return sorted((run / "checkpoints").glob("corrupt-step-*"))


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


def verify(folder: Path) -> None:
    """Raise CheckpointError or ModelError unless the files of a checkpoint match its manifest."""
    listed = files.verify_manifest(folder)
    if missing := [name for name in (WEIGHTS, ABOUT) if name not in listed]:
        what = f"the manifest does not list {missing[0]}" if listed else "has no manifest"
        raise CheckpointError(f"{what}, so nothing vouches for it", where=folder, hint="go on from another checkpoint")


KINDS = {"step": int, "settings": dict, "losses": list, "environment": dict}  # of what state.json has to hold
MORE = {"inputs": dict, "scaler": dict}  # and may hold


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


def tell_differences(before: Mapping[str, Any], device: torch.device) -> None:
    """Print what has changed in the environment, because then the weights cannot be bit-identical."""
    now = environment(device)
    told = ", ".join(f"{name} {old} → {now.get(name)}" for name, old in before.items() if old != now.get(name))
    if told:
        say(f"resuming in another environment ({told}): the weights will not be bit-identical")
