"""What a fine-tuning would take here, before its data is encoded: two of its steps, tried on made-up numbers."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.console import say
from ldm.training.data import Batch
from ldm.training.distributed import RowShard
from ldm.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from ldm.training.data import Pictures
    from ldm.training.loop.estimate import Estimate
    from ldm.training.stages.finetune import Finetune

CAPTION = "a picture of a thing"
MOST = 2  # times the side of the model's pictures: a trial must not be what memory runs out in


def measure(settings: FinetuneSettings, out: Path, pictures: Pictures | None = None) -> Estimate:
    """Two steps on a batch of the resolution's square; before, `pictures` are told of, with the captions that are cut.

    Raises ModelError, ResourceError out of memory.
    """
    import torch

    from ldm.errors import ResourceError
    from ldm.training.loop.estimate import estimate
    from ldm.training.stages.finetune import Finetune

    try:
        stage = Finetune(settings, out)
        if pictures is not None:
            for read, kind in ((pictures, ""), (pictures.prior, "prior: ")):
                if read is not None:
                    read.cut = stage.model.text.truncated
                    say("\n".join(f"{kind}{line}" for line in read.lines))
        return estimate(stage, settings, trial_batch(stage))
    except (MemoryError, torch.OutOfMemoryError) as error:
        todo = "lower batch_size (and raise accumulation), or set gradient_checkpointing"
        raise ResourceError(f"a step does not fit into memory ({error})", where=settings.model, todo=todo) from None


def trial_batch(stage: Finetune) -> Batch:
    """Latents of noise under one caption, as many and as large as the settings have them, and as many of the prior."""
    import torch

    s, model, count = stage.settings, stage.model, stage.settings.batch_size
    side = s.data.resolution // model.vae.factor
    latents = torch.randn((count, model.vae.latent_channels, side, side), generator=torch.Generator().manual_seed(0))
    captions = [CAPTION] * count
    cond = None if s.text_encoder else model.text.encode(captions).to(stage.device, torch.float32)
    sizes = torch.tensor([[s.data.resolution] * 2 + [0, 0] + [s.data.resolution] * 2] * count, dtype=torch.float32)
    ids = sizes.to(stage.device) if stage.xl else None
    made = Batch(latents.to(stage.device), captions, cond, ids, captions, RowShard(count))
    return dataclasses.replace(made, prior=made) if s.prior or s.prior_images else made


def forecast(samples: int, model: str = "default", resolution: int | None = None) -> tuple[str, ...]:
    """What `ldm finetune` would do with so many samples where nothing else is said, and its time, memory and disk.

    `resolution` is in pixels, None is the model's own. Raises ConfigError, ModelError, ResourceError.
    """
    from ldm import config
    from ldm.training.finetuning.options import nested
    from ldm.training.finetuning.presets import complete, read_facts

    facts, given = read_facts(model, None, "auto"), {"model": model, "data.folder": "."}
    if resolution is not None:
        fits = resolution <= MOST * facts.side
        config.require(fits, f"a step at {resolution} px is not tried: {model} draws at {facts.side}", "resolution")
        given["data.resolution"] = resolution
    settings = config.build(FinetuneSettings, nested(complete(given, facts, [samples])))
    with tempfile.TemporaryDirectory(prefix="ldm-forecast-") as out:
        found = measure(settings, Path(out))
    s = settings
    each = f"{s.batch_size} pictures" if s.accumulation == 1 else f"{s.accumulation} times {s.batch_size} pictures"
    told = f"{s.steps} steps of {each} at {s.data.resolution} px, as `ldm finetune` chooses them"
    return (f"a LoRA of rank {s.lora_rank} on the model {model}: {told}", *found.lines)
