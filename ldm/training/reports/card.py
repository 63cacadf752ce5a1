"""The model card of a trained model: what it was made of and how, as far as the run itself knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.checkpoint import Model
from ldm.training.settings import FinetuneSettings, UNetSettings, as_dict

EMOJI = """Scenes drawn by this package from the font Noto Color Emoji (SIL Open Font License 1.1), captioned from
Unicode's names and CLDR's keywords (Unicode licence). Every combination whose sha256 modulo 10 is 0 is held out."""
FOLDER = "Captioned pictures of the user's own (`{}`); whoever shares the model answers for their licences."
FINETUNED = """# {title}

```python
from ldm import Pipeline

Pipeline("…", model="this/folder").generate()[0].save("picture.png")
```

The folder has the layout of diffusers. It was fine-tuned by `ldm finetune` from {base}, whose licence holds on.

## Data

{data}

## Parts

{parts}

Weights are the exponential moving average of the training's, in {dtype}.

## Recipe

```json
{recipe}
```

## Scores

{scores}
"""
TEXT = """# A latent text-to-image model trained by `ldm train`

```python
from ldm import Pipeline

Pipeline("a cat", model="this/folder").generate()[0].save("cat.png")
```

The folder has the layout of diffusers: `StableDiffusionPipeline.from_pretrained("this/folder")` loads it too.

## Data

{data}

## Parts

{parts}

Weights are the exponential moving average of the training's, in bfloat16.

## Recipe

The last of the runs that made it; `init` names the one before, `vae` and `text` those of the other two stages.

```json
{recipe}
```

## Scores

{scores}
"""


def unet_card(
    settings: UNetSettings, device: str, modules: Mapping[str, nn.Module], scores: Mapping[str, float]
) -> str:
    """README.md of a complete model: front matter with `trained_on` and the defaults of Pipeline, then the text."""
    s = settings
    head = {"library_name": "ldm", "pipeline_tag": "text-to-image", "trained_on": "cpu" if device == "cpu" else "gpu"}
    head["ldm"] = {"sampler": s.sampler, "num_inference_steps": s.sample_steps, "guidance_scale": s.guidance_scale}
    matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    text = TEXT.format(
        data=FOLDER.format(s.data.folder) if s.data.folder else EMOJI,
        parts=_parts(modules),
        recipe=json.dumps(as_dict(s), indent=1),
        scores=_scores(scores),
    )
    return f"---\n{matter}\n---\n\n{text}"


def finetune_card(
    settings: FinetuneSettings, base: Model, device: str, modules: Mapping[str, nn.Module], scores: Mapping[str, float]
) -> str:
    """README.md of a model that was fine-tuned as a whole; how it is best drawn with is what its base says."""
    s = settings
    head: dict[str, Any] = {"library_name": "ldm", "pipeline_tag": "text-to-image"}
    head |= {"trained_on": "cpu" if device == "cpu" else "gpu"}
    head |= {"ldm": base.info["ldm"]} if isinstance(base.info.get("ldm"), dict) else {}
    matter = "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())
    text = FINETUNED.format(
        title=f"{base.name or 'A model'}, fine-tuned",
        base=f"`{s.model}`{f' (sha256 {base.hash[:12]})' if base.hash else ''}",
        data=FOLDER.format(s.data.folder),
        parts=_parts(modules),
        dtype=s.save_dtype or "bf16",
        recipe=json.dumps(as_dict(s), indent=1),
        scores=_scores(scores),
    )
    return f"---\n{matter}\n---\n\n{text}"


def finetune_note(settings: FinetuneSettings, lines: Sequence[str], scores: Mapping[str, float]) -> str:
    """A paragraph for a LoRA's card: what it was trained on, how long, and how well it did."""
    s = settings
    told = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    counts = lines[1] if len(lines) > 1 else ""  # the first names the layout
    steps = f"{s.steps} steps of {s.batch_size * s.accumulation} pictures, learning rate {s.learning_rate:g}"
    return f"Trained on `{s.data.folder}` ({counts}): {steps}.{f' In the end: {told}.' if told else ''}"


def _parts(modules: Mapping[str, nn.Module]) -> str:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    rows = [f"| {name} | {count / 1e6:.2f} M |" for name, count in {**counts, "all": sum(counts.values())}.items()]
    return "\n".join(["| part | parameters |", "|---|---|", *rows])


def _scores(scores: Mapping[str, float]) -> str:
    return "\n".join(f"- {name}: {value:.4g}" for name, value in scores.items()) or "None were taken."
