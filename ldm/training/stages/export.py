"""A whole model as a stage leaves it, with its card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ldm.checkpoint import Model, save_model
from ldm.device import pick_device
from ldm.training.reports.card import finetune_card
from ldm.training.settings import FinetuneSettings

SMALL = 100_000_000  # parameters up to which a model is written in files that git hosts take


def lora_folder(out: Path, folder: Path) -> Path:
    """Where a LoRA is written: the run's own folder `out`, those of other averages into the `folder` of each."""
    return out if folder == out / "model" else folder


def save_whole(
    model: Model, folder: Path, dtype: torch.dtype | str, card: Callable[[Mapping[str, nn.Module]], str]
) -> Path:
    """Write `model` into `folder`; `card` gives the text of its README.md from its networks by name."""
    modules = {"unet": model.unet, "vae": model.vae.module, "text encoder": nn.ModuleList(model.text.modules)}
    small = sum(p.numel() for module in modules.values() for p in module.parameters()) < SMALL
    return save_model(model, folder, dtype=dtype, max_shard_mb=15 if small else 5000, readme=card(modules))


def save_finetuned(
    model: Model, folder: Path, settings: FinetuneSettings, words: frozenset[str], scores: Mapping[str, float]
) -> Path:
    """Write a model that was trained as a whole; `words` are those of its captions, if its text encoder knows such."""
    if words:
        model.text = copy.copy(model.text)
        model.text.words |= words
    card = partial(finetune_card, settings, model, pick_device(settings.device).type, scores=scores)
    return save_whole(model, folder, settings.save_dtype or "bf16", card)
