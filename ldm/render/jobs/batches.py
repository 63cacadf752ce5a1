"""Which jobs are drawn together and in which order: windows of jobs, groups in a window, images in a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ldm.checkpoint.describe import ModelInfo
from ldm.device import free_memory
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.pipeline.keywords import BATCH
from ldm.render.jobs.jobs import Job, canonical
from ldm.render.prompts.setting_table import IMAGE, of_scope

WINDOW = 1024  # jobs that are looked ahead
WINDOW_TEXT = 16 << 20  # characters of their texts, at most
VARY = of_scope(IMAGE)  # settings that may differ inside a batch
LOADED = ("model", "vae", "text_encoders", "dtype", "quantization", "controlnet", "ip_adapter", "image_encoder")
MOST = {"cpu": BATCH, "cuda": 64, "mps": BATCH}  # images in a batch
TENSORS = 32  # of the size of the U-Net's first level that are taken to be alive at once: an estimate, on the safe side
SPARE = 0.7  # of the free memory that is planned with


class Group(NamedTuple):
    """What a job has in common with those that it can share a batch with."""

    model: str  # with the parts that replace its own
    lora: str
    shared: bytes
    guided: bool  # steps without guidance cost half

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Group:
        shared = {name: value for name, value in settings.items() if name not in VARY}
        guided = settings.get("true_cfg_scale", settings["guidance_scale"]) > 1
        model = canonical({name: settings[name] for name in LOADED if name in settings}).decode()
        return cls(model, str(settings.get("lora", "")), canonical(shared), guided)

    @property
    def weights(self) -> tuple[str, str]:
        """What has to be loaded and merged for it."""
        return self.model, self.lora


def windows(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """The jobs in lists of at most WINDOW, in their order."""
    window, text = [], 0
    for job in jobs:
        window.append(job)
        text += len(job.settings["prompt"]) + len(job.settings["negative_prompt"] or "")
        if len(window) == WINDOW or text > WINDOW_TEXT:
            yield window
            window, text = [], 0
    if window:
        yield window


def groups(window: Iterable[Job], last: Group | None = None) -> list[tuple[Group, list[Job]]]:
    """A window's jobs by what they share, ordered so that models, then LoRAs, change seldom; `last` is in memory."""
    by_group: dict[Group, list[Job]] = {}
    for job in window:
        by_group.setdefault(Group.of(job.settings), []).append(job)
    models, weights = {}, {}  # in their order
    for group in ([last] if last else []) + list(by_group):
        models.setdefault(group.model, len(models))
        weights.setdefault(group.weights, len(weights))
    return sorted(by_group.items(), key=lambda item: (models[item[0].model], weights[item[0].weights]))


def batch_size(info: ModelInfo, settings: Any, device: torch.device, dtype: torch.dtype, coming: int = 0) -> int:
    """How many images are denoised together, by the memory that is free; a bound, not a promise.

    `settings` are a group's (height and width in pixels). An image is two rows of the U-Net, with and without prompt.
    `coming`: bytes of weights that are still to go where the U-Net works.
    """
    config, factor = info.unet, info.factor
    area = (settings.height // factor) * (settings.width // factor)
    flow = isinstance(config, MMDiTConfig)
    width = config.width // config.patch_size**2 if flow else config.block_out_channels[0]
    row = area * width * TENSORS * dtype.itemsize
    row += area * min(area, 4096) * 4  # one head's scores
    return max(1, min(MOST.get(device.type, BATCH), int(SPARE * (free_memory(device) - coming) / (2 * row))))
