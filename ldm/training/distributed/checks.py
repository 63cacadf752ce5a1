"""The checks of a run on several processes."""

from __future__ import annotations

import hashlib
import json
import socket
from pathlib import Path
from typing import Any

from ldm.config import require
from ldm.device import half_dtype, pick_device
from ldm.errors import DataError
from ldm.training.distributed.alone import Alone, current
from ldm.training.settings import Settings, as_dict

# Stages whose loss is a mean over the images of a batch.
BY_ROWS = ("autoencoder", "unet", "finetune", "control", "distill")


def check_processes(settings: Settings) -> None:
    """Raise ConfigError for settings that do not go with the number of processes or their kind."""
    group = current()
    if group.world == 1:
        return
    count, device = f"{group.world} processes", pick_device(settings.device)
    known = settings.stage in BY_ROWS
    require(known, f"{settings.stage} compares the images of a batch: train it on one process", "stage")
    fits = settings.batch_size >= group.world
    require(fits, f"{settings.batch_size} images are too few for {count}: raise it, or start fewer", "batch_size")
    require(device.type != "mps", f"mps is for one process, not for {count}: use device=cpu", "device")
    if device.type == "cuda":
        _check_gpus(group)
    if group.sharded:
        _check_sharded(settings, half_dtype(settings.precision, device))


def _check_gpus(group: Alone) -> None:
    """Raise ConfigError where two processes have the same GPU; each may see all of a machine's, or its own alone."""
    import torch

    own = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    names = group.gathered([f"{socket.gethostname()} {own}"])
    shared = len(names) - len(set(names))
    require(not shared, f"{shared + 1} processes have the same GPU: start one for each, not more", "device")


def check_same_settings(settings: Settings, out: Path) -> None:
    """Raise ConfigError where a process has other settings than the first one, each having resolved them by itself."""
    group = current()
    digest = hashlib.sha256(json.dumps(as_dict(settings), sort_keys=True).encode()).hexdigest()
    expected = group.on_first(lambda: digest)
    what = f"process {group.rank} of {group.world} has other settings than process 0: give all of them"
    group.on_all(lambda: require(digest == expected, what, str(out)))


def check_same_inputs(inputs: dict[str, str], out: Path) -> None:
    """Raise DataError if the processes of a run read different inputs."""
    group = current()
    firsts = group.on_first(lambda: inputs)

    def same() -> None:
        for name, digest in inputs.items():
            if firsts.get(name) != digest:
                raise DataError(f"process {group.rank} of {group.world} reads another {name} than process 0", where=out)

    group.on_all(same)


def _check_sharded(s: Settings, half: Any) -> None:
    whole = f"{s.optimizer} needs whole tensors, of which FSDP2 keeps parts: use adamw"
    require(s.optimizer not in ("muon", "adamw8bit"), whole, "optimizer")
    require(str(half) != "torch.float16", "fp16 does not go with FSDP2: use bf16", "precision")
    require(s.stage != "autoencoder", "autoencoder is small: train it without FSDP2", "stage")
    require(s.stage != "distill", "distill asks a teacher that is whole: train it without FSDP2", "stage")
    require(not getattr(s, "compile", False), "does not go with FSDP2", "compile")


def check_lock(out: Path) -> None:
    """Raise ConfigError where this process does not see the run's folder, which the first one has locked."""
    group = current()
    is_seen = (out / ".lock").exists()
    require(is_seen, f"process {group.rank} of {group.world} does not see {out}: use a folder that all share", "out")
