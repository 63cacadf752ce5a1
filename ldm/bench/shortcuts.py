"""Speed that is paid in exactness: guidance in some of the steps alone, deep features reused by later steps."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from ldm import console
from ldm.bench.samplers import MAX_PROMPTS, PROMPTS, rms_difference
from ldm.bench.timing import Timing, alternate
from ldm.checkpoint.describe import describe
from ldm.device import dtype_name, pick_device, pick_dtype
from ldm.diffusion.guidance.settings import SIGMA_INTERVALS, STEP_INTERVALS
from ldm.pipeline.checks import check_int
from ldm.pipeline.pipeline import Pipeline

STEP_CACHES = (2, 3, 5)
EXACT = "exact"


def shortcuts(
    repeats: int = 3,
    model: str = "default",
    prompts: int = 4,
    steps: int | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
) -> Timing:
    """Time `prompts` images, the i-th with seed i, by each shortcut and exactly, in alternation, and compare them.

    `agreement` has, for each, its share of the exact images' time and its distance from them: RMS over pixels in
    levels of 255, mean over the images. Each image is drawn alone, with the model's settings (or `steps`).
    """
    texts = [PROMPTS[i % len(PROMPTS)] for i in range(check_int(prompts, "prompts", 1, MAX_PROMPTS))]
    place = pick_device(device)
    device, dtype = str(place), dtype_name(pick_dtype(dtype, place))
    pipe = Pipeline(texts, model=model, dtype=dtype, device=device)
    is_unet = describe(model).transformer is None
    ways: dict[str, dict[str, Any]] = {f"step_cache {n}": {"step_cache": n} for n in STEP_CACHES if is_unet}
    ways |= {f"guidance {name}": {"guidance_interval": name} for name in STEP_INTERVALS}
    ways |= {f"guidance {name} (sigmas)": {"guidance_sigma_interval": name} for name in SIGMA_INTERVALS}
    ways[EXACT] = {}
    images: dict[str, Any] = {}

    def draw(name: str) -> None:
        seeds = list(range(1, len(texts) + 1))
        images[name] = pipe.generate(seed=seeds, batch_size=1, num_inference_steps=steps, **ways[name])

    with console.hushed():
        seconds = alternate({name: partial(draw, name) for name in ways}, repeats)
    exact, agreement = statistics.median(seconds[EXACT]), {}
    for name in [name for name in ways if name != EXACT]:
        agreement[f"{name}: share of the time"] = statistics.median(seconds[name]) / exact
        agreement[f"{name}: distance of 255"] = rms_difference(images[name], images[EXACT])
    first = images[EXACT].metadata[0]
    settings = {name: first[name] for name in ("sampler", "num_inference_steps", "guidance_scale")}
    settings = {"model": str(model), "images": len(texts), **settings, "dtype": dtype, "device": device}
    return Timing("shortcuts", seconds, {**settings, "threads": torch.get_num_threads()}, agreement)
