"""Time, memory and disk of a fine-tuning before its data is encoded: two of its steps are tried on random latents."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch

from ldm.config import require
from ldm.console import say
from ldm.device import is_out_of_memory
from ldm.errors import ResourceError
from ldm.training.data import Batch, ImageSet
from ldm.training.distributed import RowShard
from ldm.training.loop.estimate import Estimate, estimate
from ldm.training.settings import FinetuneSettings
from ldm.training.stages.common import square_ids
from ldm.training.stages.control import Control
from ldm.training.stages.finetune import Finetune
from ldm.training.stages.prior import WithPrior

CAPTION = "an image of a thing"
STAGES: dict[str, type[Finetune]] = {"finetune": Finetune, "prior": WithPrior, "control": Control}  # by their module
MAX_SCALE = 2  # times the side of the model's images: the trial must not run out of memory


def measure(settings: FinetuneSettings, out: Path, images: ImageSet | None = None) -> Estimate:
    """Take two steps on a batch of the resolution's square; print the counts of `images` and captions that are cut.

    Raises ModelError, ResourceError out of memory.
    """
    try:
        stage = STAGES[settings.module](settings, out)
        for image_set, kind in ((images, ""), (images and images.prior, "prior: ")):
            if image_set is not None:
                image_set.cut = stage.model.text.truncated
                say("\n".join(f"{kind}{line}" for line in image_set.lines))
        return estimate(stage, settings, trial_batch(stage))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower batch_size (and raise accumulation), or set gradient_checkpointing"
        raise ResourceError(f"a step does not fit into memory ({error})", where=settings.model, hint=hint) from None


def trial_batch(stage: Finetune) -> Batch:
    """Random latents under one caption, in the number and size of the settings, and the same for a prior."""
    s, model, count = stage.settings, stage.model, stage.settings.batch_size
    side = s.data.resolution // model.vae.factor
    latents = torch.randn((count, model.vae.latent_channels, side, side), generator=torch.Generator().manual_seed(0))
    captions = [CAPTION] * count
    cond = None if s.text_encoder else model.text.encode(captions).to(stage.device, torch.float32)
    ids = square_ids(s.data.resolution, stage.device).repeat(count, 1) if stage.xl else None
    made = Batch(latents.to(stage.device), captions, cond, ids, captions, RowShard(count))
    if s.control is not None:
        image = torch.zeros((count, 3, s.data.resolution, s.data.resolution), device=stage.device)
        return dataclasses.replace(made, control=image)
    return dataclasses.replace(made, prior=made) if s.prior or s.prior_images else made


def outlook(settings: FinetuneSettings) -> str:
    """What `ldm finetune` does with these settings."""
    s = settings
    each = f"{s.batch_size} images" if s.accumulation == 1 else f"{s.accumulation} times {s.batch_size} images"
    steps = f"{s.steps} steps of {each} at {s.data.resolution} px, as `ldm finetune` chooses them"
    return f"a LoRA of rank {s.lora_rank} on the model {s.model}: {steps}"


def forecast(settings: FinetuneSettings, side: int) -> tuple[str, ...]:
    """The time, memory and disk that it takes, by two steps that are tried; `side` are the model's pixels.

    Raises ConfigError, ModelError, ResourceError.
    """
    size, model = settings.data.resolution, settings.model
    require(size <= MAX_SCALE * side, f"a step at {size} px is not tried: {model} draws at {side}", "resolution")
    with tempfile.TemporaryDirectory(prefix="ldm-forecast-") as out:
        return measure(settings, Path(out)).lines
