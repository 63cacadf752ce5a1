"""The exact state of a run on disk: weights, EMA, optimizer and step, written whole or not at all."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import files
from ldm.console import say, warn
from ldm.errors import CheckpointError, ModelError

FORMAT = 1


@dataclass
class TrainState:
    """What a step changes. Randomness is keyed by the step (see keyed.py), so it is not part of it."""

    module: nn.Module
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps done

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a flat name."""
        found = {f"model.{k}": v for k, v in self.module.state_dict().items()}
        found |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for name, parameter in trainable(self.module).items():
            for slot, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{slot}"] = torch.as_tensor(value)
        return {k: v.detach().to("cpu").contiguous() for k, v in found.items()}

    def restore(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Put back what `tensors` gave; the parameters keep their place in memory and on their device."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.module.load_state_dict(parts["model"], strict=True)
        self.ema.load_state_dict(parts["ema"], strict=True)
        for name, parameter in trainable(self.module).items():
            slots = {k.rpartition(".")[2]: v for k, v in parts["optimizer"].items() if k.rpartition(".")[0] == name}
            if slots:
                self.optimizer.state[parameter] = {k: _laid_out_as(parameter, v) for k, v in slots.items()}
        self.step = step


def _laid_out_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A moment in the memory layout of its parameter: the fused optimizer walks both by address."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)  # the count of steps
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer moves, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def environment(device: torch.device) -> dict[str, Any]:
    """What the bits of a run depend on beside its settings."""
    where = platform.machine(), torch.backends.cpu.get_cpu_capability()
    if device.type == "cuda":
        where = "cuda", torch.cuda.get_device_name(device)
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": " ".join(where)}


def save(state: TrainState, run: Path, settings: dict[str, Any], keep: int, extra: Mapping[str, Any] = {}) -> Path:
    """Write `checkpoints/step-N`, read it back against its manifest, then remove all but the newest `keep`."""
    from safetensors.torch import save_file

    tensors = state.tensors()
    bad = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(f"{len(bad)} tensors are not finite ({bad[0]}, …)", where=run, todo="nothing was saved")
    folder = run / "checkpoints" / f"step-{state.step:08d}"
    files.require_space(run, int(1.2 * sum(v.numel() * v.element_size() for v in tensors.values())))
    about = {"format": FORMAT, "step": state.step, "settings": settings, **extra}
    about["environment"] = environment(next(state.module.parameters()).device)
    with files.atomic_folder(folder) as tmp:
        save_file(tensors, tmp / "state.safetensors")
        (tmp / "state.json").write_text(json.dumps(about, indent=1) + "\n")
        files.write_manifest(tmp)
    files.verify_manifest(folder)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.is_dir())


def newest(run: Path) -> Path | None:
    """The newest checkpoint that its manifest vouches for; damaged ones are renamed `corrupt-…` and named.

    Raises CheckpointError when there were checkpoints and none is whole.
    """
    found = checkpoints(run)
    for folder in reversed(found):
        try:
            if not files.verify_manifest(folder):
                raise ModelError("has no manifest", where=folder)
            return folder
        except ModelError as error:
            folder.rename(folder.with_name(f"corrupt-{folder.name}"))
            warn(f"{error}; set aside as corrupt-{folder.name}, trying the one before it")
    if found:
        raise CheckpointError("no checkpoint is whole", where=run, todo="start anew in another folder")
    return None


def read_about(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError; for another format it names both versions."""
    try:
        about = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            "is no checkpoint of ldm", where=folder, todo="give a folder checkpoints/step-…"
        ) from None
    if about.get("format") != FORMAT:
        raise CheckpointError(f"has format {about.get('format')}, this version reads {FORMAT}", where=folder)
    return about


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, after its manifest has vouched for them. Raises ModelError where it does not."""
    from safetensors.torch import load_file

    files.verify_manifest(folder)
    return load_file(folder / "state.safetensors")


def tell_differences(before: Mapping[str, Any], device: torch.device) -> None:
    """Say in one line what of the environment is not as it was, so that the weights cannot be bit-identical."""
    now = environment(device)
    told = ", ".join(f"{name} {old} → {now.get(name)}" for name, old in before.items() if old != now.get(name))
    if told:
        say(f"resuming in another environment ({told}): the weights will not be bit-identical")
