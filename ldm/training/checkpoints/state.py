"""The exact state of a run, and how it is saved: whole or not at all. `reading` reads it."""

from __future__ import annotations

import json
import os
import platform
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
from ldm.checkpoint.lora.read import FILE
from ldm.checkpoint.safety import verify_manifest, write_manifest
from ldm.checkpoint.tensors import Source, write_tensors
from ldm.errors import CheckpointError, NumericsError, ResourceError
from ldm.training.distributed import current
from ldm.training.distributed.alone import Single, whole

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
    averages: dict[float, dict[str, Tensor]] = field(default_factory=dict)  # decay -> name -> one more average
    stage: Mapping[str, Tensor] = field(default_factory=dict)  # what the stage keeps itself

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
        for decay, average in self.averages.items():
            found |= {f"average.{decay:.9f}/{name}": value for name, value in average.items()}
        found |= {f"stage.{name}": value for name, value in self.stage.items()}
        first, kept = self.parallel.group.first, {}
        for name, value in found.items():
            value = whole(value.detach())
            if first:
                kept[name] = value.to("cpu").contiguous()
        return kept


def trained_names(module: nn.Module) -> list[str]:
    """The names in the state_dict of trained parameters and buffers."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return [name for name in module.state_dict() if name not in frozen]


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
        sources = {
            name: Source(value.dtype, tuple(value.shape), lambda value=value: value) for name, value in tensors.items()
        }
        write_tensors(tmp / WEIGHTS, sources, {"format": "pt"})
        (tmp / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        write_manifest(tmp)
    verify_manifest(folder)
    return folder


@contextmanager
def _room_told(folder: Path, size: int) -> Iterator[None]:
    """Add to a disk error how much space is needed and free."""
    try:
        yield
    except ResourceError as error:
        free = shutil.disk_usage(folder.parent if folder.parent.is_dir() else folder.parents[1]).free
        what = f"{error.what}: {size} bytes are needed, {free} are free on the disk"
        raise ResourceError(what, where=folder, hint=error.hint) from None


def last_good(run: Path) -> str:
    """A phrase about the last good checkpoint."""
    found = checkpoints(run)
    return f"the last checkpoint is good ({found[-1].name})" if found else "there is no checkpoint yet"


def way_back(run: Path) -> str:
    """What to do after a disk error, beside freeing some space."""
    return f"{last_good(run)}, {'go on with --resume' if checkpoints(run) else 'so begin again'}"


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


def step_of(checkpoint: Path) -> int:
    """The step that a folder `step-N` was saved after."""
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and p.name[5:].isdecimal())


def corrupt(run: Path) -> list[Path]:
    """The checkpoints of a run that were found to be damaged."""
    return sorted((run / "checkpoints").glob("corrupt-step-*"))


def check_new(out: Path, look: bool = False) -> None:
    """Raise CheckpointError where the folder holds a run. With `look` nothing is removed of what killed runs left."""
    if not look:
        sweep(out)
    if checkpoints(out) or corrupt(out):
        raise CheckpointError("already holds a run", where=out, hint="go on with --resume, or choose another folder")
    check_unfinished(out)


def sweep(out: Path) -> None:
    """Remove what killed runs left half-written in the folder."""
    for folder in (out, out / "checkpoints", out / "samples"):
        files.sweep(folder)


def check_unfinished(out: Path) -> None:
    """Raise CheckpointError if `out` holds a finished model without checkpoints: it would be overwritten."""
    found = [name for name in ("model", FILE) if (out / name).exists()]
    if found and (out / "settings.json").exists():
        told = f"already holds a run that is finished ({found[0]}), and no checkpoint to go on from"
        raise CheckpointError(told, where=out, hint="choose another folder")
