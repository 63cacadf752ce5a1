"""What render knows of each setting, in one table: its scope, its parser in prompt lines, its option, its grid axis.

A new setting of Pipeline or generate needs one line here; keys, batches, grids, replays and the gallery follow it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ldm.pipeline.keywords import GUIDANCE_WORDS, MAX_IMAGES, MAX_STEPS
from ldm.render.prompts import network_values as networks
from ldm.render.prompts import values

# Scopes. LINE: how many images a line makes and what they are called, in no job's settings. IMAGE: may differ between
# the images of a batch. BATCH: equal for all images of a batch. RUN: of the whole run, in no job's settings.
LINE, IMAGE, BATCH, RUN = "line", "image", "batch", "run"


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table."""

    scope: str
    parser: values.Parser | None = None  # of a prompt line's value; None: lines have no word for it
    option: str | None = None  # of `ldm generate`, for the gallery's commands; None: drawn from the image's file
    counts: bool = False  # whether a grid axis may count it: 4-16:4
    sets: tuple[str, ...] = ()  # the settings that its value becomes, where that is not itself


SETTINGS: dict[str, Setting] = {
    "name": Setting(LINE, values.name),
    "num_images": Setting(LINE, values.whole(1, MAX_IMAGES)),
    "batch_size": Setting(LINE, values.whole(1, MAX_IMAGES)),  # A1111's: multiplies num_images
    "prompt": Setting(IMAGE, values.prompt),
    "negative_prompt": Setting(IMAGE, values.prompt, "--negative-prompt"),
    "seed": Setting(IMAGE, values.seeds, "--seed", counts=True),
    "guidance_scale": Setting(IMAGE, values.factor, "--guidance-scale", counts=True),
    "variation_seed": Setting(IMAGE, values.whole(-1, values.MAX_SEED), counts=True),
    "variation_strength": Setting(IMAGE, values.fraction, counts=True),
    "image": Setting(IMAGE, values.path),
    "mask_image": Setting(IMAGE, values.path),
    "outpaint": Setting(IMAGE),
    "control_image": Setting(IMAGE, networks.control_images),
    "control": Setting(BATCH, networks.control, sets=("control", "control_image", "controlnet_conditioning_scale")),
    "controlnet": Setting(BATCH, networks.controlnets),
    "controlnet_conditioning_scale": Setting(BATCH, networks.numbers),
    "control_guidance_start": Setting(BATCH, networks.numbers),
    "control_guidance_end": Setting(BATCH, networks.numbers),
    "control_mode": Setting(BATCH, networks.modes),
    "guess_mode": Setting(BATCH, values.switch),
    "ip_adapter": Setting(BATCH, networks.paths),
    "image_encoder": Setting(BATCH, values.model),
    "ip_adapter_image": Setting(IMAGE, networks.image_lists),
    "ip_adapter_scale": Setting(BATCH, networks.adapter_scales),
    "ip_adapter_mask": Setting(IMAGE, networks.image_lists),
    **{word: Setting(BATCH, option=f"--{word.replace('_', '-')}") for word in GUIDANCE_WORDS},
    "guidance_rescale": Setting(BATCH, values.fraction, "--guidance-rescale", counts=True),
    "model": Setting(BATCH, values.model, "--model"),
    "vae": Setting(BATCH, option="--vae"),
    "text_encoders": Setting(BATCH, networks.paths),
    "quantization": Setting(BATCH, values.quantization, "--quantization"),
    "lora": Setting(BATCH, networks.loras, "--lora"),
    "dtype": Setting(BATCH, values.dtype, "--dtype"),
    "num_inference_steps": Setting(BATCH, values.whole(1, MAX_STEPS), "--steps", counts=True),
    "height": Setting(BATCH, values.side, "--height", counts=True),
    "width": Setting(BATCH, values.side, "--width", counts=True),
    "size": Setting(BATCH, values.size, sets=("width", "height")),
    "sampler": Setting(BATCH, values.sampler, "--sampler", sets=("sampler", "spacing")),
    "spacing": Setting(BATCH, values.spacing, "--spacing"),
    "timesteps": Setting(BATCH, option="--timesteps"),
    "sigmas": Setting(BATCH, option="--sigmas"),
    "eta": Setting(BATCH, values.fraction, "--eta", counts=True),
    "true_cfg_scale": Setting(BATCH, values.factor, "--true-cfg-scale", counts=True),
    "clip_skip": Setting(BATCH, values.clip_skip, "--clip-skip", counts=True),
    "emphasis": Setting(BATCH, option="--emphasis"),
    "step_cache": Setting(BATCH, values.whole(1, MAX_STEPS), "--step-cache", counts=True),
    "strength": Setting(BATCH, values.fraction, counts=True),
    "hires_scale": Setting(BATCH, values.factor),
    "hires_steps": Setting(BATCH, values.whole(1, MAX_STEPS)),
    "hires_strength": Setting(BATCH, values.fraction),
    "vae_tiling": Setting(BATCH),
    "device": Setting(RUN),
    "offload": Setting(RUN),
    "attention": Setting(RUN),
    "compile": Setting(RUN),
    "backend": Setting(RUN),
    "prediction_type": Setting(RUN, option="--prediction-type"),
    "allow_unapplied": Setting(RUN),
    "dora_scaling": Setting(RUN, option="--dora-scaling"),
    "lora_dir": Setting(RUN),
    "fast": Setting(RUN),
}
TEXTS = tuple(name for name, setting in SETTINGS.items() if setting.parser is values.prompt)  # may hold templates


@functools.cache
def of_scope(*scopes: str) -> frozenset[str]:
    """The names of the settings of these scopes."""
    return frozenset(name for name, setting in SETTINGS.items() if setting.scope in scopes)


OF_RUN = of_scope(RUN)
# A line's drawn seed comes from all of its settings but these.
NOT_CONTENT = of_scope(LINE) | {"seed"}
