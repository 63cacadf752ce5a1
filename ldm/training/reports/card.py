"""The model card of a trained model: what it was made from and how, as far as the run knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldm.checkpoint import Model
from ldm.checkpoint.folder import CLIP_LAYOUT, T5_LAYOUT
from ldm.nn.mmdit import MMDiT
from ldm.nn.text import T5Text, XLText
from ldm.training.settings import DistillSettings, FinetuneSettings, Settings, UNetSettings, as_dict
from ldm.training.settings.base import name_of

EMOJI = """Scenes that this package draws from the font Noto Color Emoji (SIL Open Font License 1.1), with captions from
Unicode's names and CLDR's keywords (Unicode licence). Every combination whose sha256 modulo 10 is 0 is held out."""
FOLDER = "The user's captioned images (`{}`); whoever shares the model answers for their licences."
CARD = """---
{head}
---

# {title}

```python
from ldm import Pipeline

Pipeline("{prompt}", model="this/folder").generate()[0].save("image.png")
```

The folder has the layout of diffusers{origin}

## Data

{data}

## Parts

{parts}

Weights are the exponential moving average of the training weights, in {dtype}.

## Recipe

{recipe}

## Scores

{scores}
"""
CONTROL_CARD = """---
{head}
---

# A ControlNet for {base}

It sees conditions of the kind {kind}: {parameters}. It goes with that model and its fine-tunings; the model's licence
applies.
{narrow}
```
ldm generate "…" --controlnet this/folder --control-image {kind}
```

## Data

{data}

## Recipe

{recipe}

## Scores

{scores}
"""
NARROW = """
Its levels are narrower than the U-Net's (`unet_block_out_channels` in config.json), which diffusers' ControlNetModel
cannot be: this folder is for `ldm` alone.
"""
ONE_SIZE = 0.3  # hires_strength of a model that knows one size: with more its shapes fall apart at twice the size
RUNS = "The last run that made it; `init` names the one before, `vae` and `text` those of the other two stages.\n\n"


def unet_card(
    settings: UNetSettings, model: Model, device: str, modules: Mapping[str, nn.Module], scores: Mapping[str, float]
) -> str:
    """README.md of a complete model: front matter with `trained_on` and the defaults of Pipeline, then the text."""
    s = settings
    defaults = {"sampler": s.sampler, "num_inference_steps": s.sample_steps, "guidance_scale": s.guidance_scale}
    defaults["hires_strength"] = ONE_SIZE
    return CARD.format(
        head=_head(device, **defaults),
        title="A latent text-to-image model trained by `ldm train`",
        prompt="a cat",
        origin=_origin(model),
        data=FOLDER.format(name_of(str(s.data.folder))) if s.data.folder else EMOJI,
        parts=_parts(modules),
        dtype="bfloat16",
        recipe=RUNS + _recipe(s),
        scores=_scores(scores),
    )


def _origin(model: Model) -> str:
    """Which pipeline of diffusers loads the folder too."""
    if isinstance(model.text, T5Text):
        return f" ({T5_LAYOUT})."
    if isinstance(model.unet, MMDiT):
        return f" ({CLIP_LAYOUT})."
    name = "StableDiffusionXLPipeline" if isinstance(model.text, XLText) else "StableDiffusionPipeline"
    return f': `{name}.from_pretrained("this/folder")` loads it too.'


def finetune_card(
    settings: FinetuneSettings, base: Model, device: str, modules: Mapping[str, nn.Module], scores: Mapping[str, float]
) -> str:
    """README.md of a model that was fine-tuned as a whole, with its base's defaults of Pipeline."""
    s = settings
    base_hash = f" (sha256 {base.hash[:12]})" if base.hash else ""
    defaults, source = base.info.get("ldm"), name_of(str(s.model))
    return CARD.format(
        head=_head(device, **(defaults if isinstance(defaults, dict) else {})),
        title=f"{base.name or 'A model'}, fine-tuned",
        prompt="…",
        origin=f". It was fine-tuned by `ldm finetune` from `{source}`{base_hash}, whose licence still applies.",
        data=FOLDER.format(name_of(str(s.data.folder))),
        parts=_parts(modules),
        dtype=s.save_dtype or "bf16",
        recipe=_recipe(s),
        scores=_scores(scores),
    )


def control_card(
    settings: FinetuneSettings,
    base: Model,
    device: str,
    parameters: int,
    lines: Sequence[str],
    scores: Mapping[str, float],
) -> str:
    """README.md of a ControlNet: what it sees, what it was trained for and on."""
    s = settings
    base_hash = f" (sha256 {base.hash[:12]})" if base.hash else ""
    kind = f"`{name_of(str(s.control))}`"
    narrow = NARROW if s.control_channels else ""
    data = FOLDER.format(name_of(str(s.data.folder))) if s.data.folder else EMOJI
    return CONTROL_CARD.format(
        head=_head(device),
        kind=kind,
        base=f"`{name_of(str(s.model))}`{base_hash}",
        narrow=narrow,
        parameters=f"{parameters / 1e6:.2f} M parameters, {s.save_dtype or 'bf16'}",
        data=f"{data} ({lines[-1]})",
        recipe=_recipe(s),
        scores=_scores(scores),
    )


def distill_card(
    settings: DistillSettings,
    base: Model,
    device: str,
    sampling: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    scores: Mapping[str, float],
) -> str:
    """README.md of a model that was distilled as a whole, with the settings to draw with."""
    s, base_hash = settings, f" (sha256 {base.hash[:12]})" if base.hash else ""
    defaults = {name: value for name, value in sampling.items() if name != "kind" and value is not None}
    taught = base.info.get("ldm")
    if isinstance(taught, dict) and "hires_strength" in taught:
        defaults["hires_strength"] = taught["hires_strength"]
    return CARD.format(
        head=_head(device, **defaults),
        title=f"{base.name or 'A model'}, {sampling['kind']}",
        prompt="…",
        origin=f". It was distilled by `ldm distill` from `{name_of(str(s.model))}`{base_hash}, whose licence applies.",
        data=_distilled_on(s),
        parts=_parts(modules),
        dtype=s.save_dtype or "bf16",
        recipe=_recipe(s),
        scores=_scores(scores),
    )


def distill_note(settings: DistillSettings, sampling: Mapping[str, Any], scores: Mapping[str, float]) -> str:
    """A paragraph for the card of a LoRA: how to draw with it, what it was made on, how long, and its scores."""
    s, last = settings, ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    how = f"{sampling['sampler']}, {sampling['num_inference_steps']} steps, no guidance"
    length = f"{s.steps} steps of {s.batch_size * s.accumulation}, learning rate {s.learning_rate:g}"
    scored = f" Scores: {last}." if last else ""
    return f"{sampling['kind']}: {how}. Made by `ldm distill`: {length}. {_distilled_on(s)}{scored}"


def _distilled_on(settings: DistillSettings) -> str:
    s = settings
    if s.prompts:
        return f"Images that the model drew, of the captions in `{name_of(s.prompts)}`."
    return FOLDER.format(name_of(str(s.data.folder))) if s.data.folder else EMOJI


def _head(device: str, **defaults: Any) -> str:
    """The front matter, as YAML; `defaults` are those of Pipeline for this model."""
    head: dict[str, Any] = {"library_name": "ldm", "pipeline_tag": "text-to-image"}
    head |= {"trained_on": "cpu" if device == "cpu" else "gpu", **({"ldm": defaults} if defaults else {})}
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in head.items())


def _parts(modules: Mapping[str, nn.Module]) -> str:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    rows = [f"| {name} | {count / 1e6:.2f} M |" for name, count in {**counts, "all": sum(counts.values())}.items()]
    return "\n".join(["| part | parameters |", "|---|---|", *rows])


def _recipe(settings: Settings) -> str:
    return f"```json\n{json.dumps(_without_paths(as_dict(settings)), indent=1)}\n```"


def _without_paths(value: Any) -> Any:
    """Settings with the last name in the place of every path: a card is shared, and home folders are not."""
    if isinstance(value, Mapping):
        return {name: _without_paths(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return name_of(value) if isinstance(value, str) else value


def _scores(scores: Mapping[str, float]) -> str:
    return "\n".join(f"- {name}: {value:.4g}" for name, value in scores.items()) or "None were taken."
