"""A stage of a few hundred numbers: the loop, its files and its failures in milliseconds a step."""

from __future__ import annotations

import torch
from PIL import Image
from torch import nn

from ldm.nn.lora import attach, new_updates
from ldm.training.checkpoints.begin import to_resume
from ldm.training.loop import seeded
from ldm.training.loop.loop import fit
from ldm.training.settings import Settings
from tests.training.conftest import threads

COMMON = {"stage": "toy", "steps": 12, "batch_size": 4, "learning_rate": 0.05, "warmup": 2, "ema": 0.5, "workers": 0}
COMMON |= {"device": "cpu", "precision": "fp32", "save_every": 3, "validate_every": 4, "log_every": 2}


def toy_settings(**changes) -> Settings:
    return Settings(**{**COMMON, **changes})


class Numbers:
    """What a batch of pictures is to a real stage, with ids."""

    def __init__(self, x, ids):
        self.x, self.ids = x, ids


class Toy:
    """Fit a fixed linear map; `lora`: by updates of a frozen network. `inside` is called at each loss."""

    def __init__(self, settings, lora=False, inside=lambda step, micro: None):
        self.settings, self.inside, self.lines = settings, inside, ["4 found", "4 used"]
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        if lora:
            updates = new_updates(self.module, ["0", "3"], 2, 2.0, generator=torch.Generator().manual_seed(0))
            attach(self.module, updates)
        self.map = torch.randn(6, 3)

    def batches(self, first_step):
        for number in range(first_step * self.settings.accumulation, self.settings.steps * self.settings.accumulation):
            x = seeded.normal((self.settings.batch_size, 6), 0, "x", number)
            yield Numbers(x, [f"{number}-{i}" for i in range(len(x))])

    def loss(self, batch, step, micro):
        self.inside(step, micro)
        return (self.module(batch.x) - batch.x @ self.map).square().mean()

    def validate(self, ema, step):
        x = seeded.normal((16, 6), 0, "held out")
        return {"validation_loss": float((ema(x) - x @ self.map).square().mean())}

    def sample_grid(self, ema):
        return Image.new("RGB", (24, 8), (int(self.validate(ema, 0)["validation_loss"] * 20) % 256, 90, 160))

    def export(self, ema, folder, scores):
        folder.mkdir(exist_ok=True)
        (folder / "weights.txt").write_text(repr([p.tolist() for p in ema.parameters()]))
        return folder


def train_toy(out, resume=None, allow_changed=(), lora=False, inside=lambda step, micro: None, kind=Toy, **changes):
    """A run as `ldm.training.train` has it, on one thread."""
    settings = toy_settings(**changes)
    with threads(1):
        checkpoint = to_resume(settings, out, resume, allow_changed)
        return fit(kind(settings, lora, inside), settings, out, checkpoint, allow_changed)
