"""The settings that all stages share."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.config import require
from ldm.errors import nearest
from ldm.training.settings.finetune_data import DataSettings

TRACKERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class Settings:
    """The settings that every stage has. Raises ConfigError for a value out of its range."""

    stage: str
    steps: int
    batch_size: int
    learning_rate: float
    data: DataSettings = field(default_factory=DataSettings)
    model: dict[str, Any] = field(default_factory=dict)  # the network's config
    accumulation: int = 1  # micro-batches of batch_size a step
    optimizer: Literal["adamw", "adamw8bit", "muon", "sgd"] = "adamw"  # adamw8bit: by bitsandbytes; sgd: no momentum
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # cosine: falls from the end of the warm-up on
    warmup: int = 100  # steps of linear warm-up
    decay_from: float = 0.6  # linear: fraction of the steps after which the learning rate falls
    final_lr: float = 0.02  # fraction of the learning rate that is left at the last step
    clip: float = 1.0  # gradient norm
    ema: float = 0.9995
    ema_lengths: tuple[float, ...] = ()  # decays of more averages, scored beside it and exported as RUN/model-ema-DECAY
    seed: int = 0
    workers: int = 1  # processes that draw scenes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: bf16 where faster, else fp16 with CUDA
    gradient_checkpointing: bool = False  # compute activations again in the backward pass instead of keeping them
    report_to: tuple[str, ...] = ()  # tensorboard, wandb: beside the page RUN/index.html
    save_every: int = 1000  # steps
    validate_every: int = 1000  # steps
    log_every: int = 20  # steps
    keep: int = 2  # checkpoints

    @property
    def module(self) -> str:
        """The module of ldm.training.stages that trains them."""
        return self.stage

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "save_every", "validate_every", "log_every"):
            require(getattr(self, name) >= 1, f"must be at least 1, not {getattr(self, name)}", name)
        require(self.learning_rate > 0, "must be positive", "learning_rate")
        require(0 <= self.ema < 1, "must be in [0, 1)", "ema")
        for decay in self.ema_lengths:
            require(0 <= decay < 1, f"must be in [0, 1), got {decay}", "ema_lengths")
        require(0 <= self.decay_from <= 1, "must be in [0, 1]", "decay_from")
        require(0 <= self.final_lr <= 1, "must be in [0, 1]", "final_lr")
        require(self.clip > 0, "must be positive", "clip")
        require(self.warmup >= 0 and self.workers >= 0, "must not be negative", "warmup, workers")
        require(all(0 <= b < 1 for b in self.betas), "must be in [0, 1)", "betas")
        require(self.weight_decay >= 0, "must not be negative", "weight_decay")
        for name in self.report_to:
            require(name in TRACKERS, f"unknown tracker {name!r}; {nearest(name, TRACKERS)}", "report_to")
        require(getattr(self, "validation", 1) >= 1, "must be at least 1", "validation")
        require(self.keep >= 2, "must be at least 2, so that one good checkpoint is always left", "keep")


def as_dict(settings: Settings) -> dict[str, Any]:
    """The settings as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings on one level, as KEY=VALUE names them: {"data.folder": …}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) and value else {above + name: value}
    return found


def name_of(path: str) -> str:
    """The last name of a path; a hub id, a text and a plain name stay."""
    if path.startswith(("/", "~", "./", "../")) or (path and os.path.exists(path)):
        return os.path.basename(path.rstrip("/")) or path
    return path
