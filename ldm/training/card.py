"""The model card of a trained model: what it was made of and how, as far as the run itself knows."""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import nn

from ldm.training.settings import UNetSettings, as_dict

EMOJI = """Scenes drawn by this package from the font Noto Color Emoji (SIL Open Font License 1.1), captioned from
Unicode's names and CLDR's keywords (Unicode licence). Every combination whose sha256 modulo 10 is 0 is held out."""
FOLDER = "Captioned pictures of the user's own (`{}`); whoever shares the model answers for their licences."
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
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    rows = [f"| {name} | {count / 1e6:.2f} M |" for name, count in {**counts, "all": sum(counts.values())}.items()]
    text = TEXT.format(
        data=FOLDER.format(s.data.folder) if s.data.folder else EMOJI,
        parts="\n".join(["| part | parameters |", "|---|---|", *rows]),
        recipe=json.dumps(as_dict(s), indent=1),
        scores="\n".join(f"- {name}: {value:.4g}" for name, value in scores.items()) or "None were taken.",
    )
    return f"---\n{matter}\n---\n\n{text}"
