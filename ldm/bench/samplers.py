"""All samplers compared: the images of each at few steps, and their distance from the image they converge to.

Samplers that add no noise solve one differential equation: for a seed they all converge to one image, which a solver of
third order with 1,000 steps approximates. Samplers that add noise draw other noise with other steps and converge to no
such image, so they have no distance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from ldm import console
from ldm.bench.comparison import Comparison, Row
from ldm.bench.sheet import plot, sheet
from ldm.checkpoint import load_model
from ldm.config import require
from ldm.diffusion.names import check, resolve
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError
from ldm.files import atomic_write, require_writable
from ldm.images import encode
from ldm.pipeline.checks import check_int
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.result import Images

STEPS = (4, 8, 16, 32)
REFERENCE, CONTROL, REFERENCE_STEPS = "unipc", "dpmpp_2m", 1000  # every kind of model supports both
PROMPTS = (
    "a cat on a red background",
    "an apple on a blue background",
    "a guitar on a yellow background",
    "a house on a green background",
    "a fish on a white background",
    "a bicycle on a pink background",
    "a tree on a gray background",
    "a rocket on a black background",
)
MAX_PROMPTS = 1000


def samplers(
    model: str | Path = "default",
    prompts: int = len(PROMPTS),
    steps: int | Sequence[int] = STEPS,
    sampler: str | Sequence[str] | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    out: str | Path | None = None,
) -> Comparison:
    """Draw `prompts` images, the i-th with seed i, with every sampler that the model supports, and compare them.

    steps    numbers of steps
    sampler  names, or one text with commas; None: all samplers
    out      a folder for samplers.png (the first prompt's images), samplers.svg (the distances) and samplers.json

    Raises ConfigError before anything is drawn, ResourceError where `out` cannot be written, ModelError for the model.
    """
    prompts = check_int(prompts, "prompts", 1, MAX_PROMPTS)
    listed = [steps] if isinstance(steps, int) else steps
    steps = sorted({check_int(n, "steps", 1, REFERENCE_STEPS) for n in listed})
    if out is not None:
        require_writable(out)
    texts, placement = [PROMPTS[i % len(PROMPTS)] for i in range(prompts)], {"dtype": dtype, "device": device}
    pipe = Pipeline(texts, model=model, **placement)
    schedule = load_model(model, device=pipe.device, dtype=pipe.dtype).schedule  # the pipeline's own: loaded once
    plan = [(name, n) for name in _chosen(sampler, schedule) for n in steps if _possible(schedule, name, n)]
    require(len(plan) > 0, f"no sampler can take {', '.join(map(str, steps))} steps with this model", "steps")
    comparison = _compare(model, texts, schedule, plan, **placement)
    if out is not None:
        _write(Path(out), comparison)
    return comparison


def cost(sampler: str, sigmas: Tensor) -> tuple[int, int]:
    """(evaluations of the network, draws of noise) of one run over `sigmas` (n + 1,), counted on a single pixel."""
    calls = [0, 0]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        calls[0] += 1
        return torch.zeros_like(x)

    def noise(i: int) -> Tensor:
        calls[1] += 1
        return torch.zeros(1, 1, 1, 1)

    SAMPLERS[sampler](denoise, torch.ones(1, 1, 1, 1), sigmas, noise)
    return calls[0], calls[1]


def _chosen(sampler: str | Sequence[str] | None, schedule: Schedule) -> list[str]:
    """Our names of the chosen samplers, or of all that the model supports. Raises ConfigError for any other."""
    if sampler is None:
        return [name for name in SAMPLERS if _fits(name, schedule.prediction_type)]
    names = []
    for text in sampler.split(",") if isinstance(sampler, str) else sampler:
        name, spacing = resolve(text)
        require(spacing is None, f"{text!r:.80} names a spacing; here every sampler has the model's own", "sampler")
        check(name, schedule.prediction_type)
        names.append(name)
    return list(dict.fromkeys(names))


def _fits(sampler: str, prediction_type: str) -> bool:
    try:
        check(sampler, prediction_type)
    except ConfigError:
        return False
    return True


def _possible(schedule: Schedule, sampler: str, steps: int) -> bool:
    """Whether the model's schedule has this many steps for a sampler (lcm has 50)."""
    try:
        schedule.sigmas(steps, sampler)
    except ConfigError:
        return False
    return True


def _compare(
    model: str | Path, texts: Sequence[str], schedule: Schedule, plan: Sequence[tuple[str, int]], **placement: str
) -> Comparison:
    """Draw the reference, the control of the first image, and the plan, under one progress bar."""
    # The one spacing of the betas that visits every timestep of the training, whatever the model's own spacing is
    spacing = None if schedule.is_flow else "trailing"
    most = REFERENCE_STEPS if schedule.is_flow else min(REFERENCE_STEPS, schedule.num_train_timesteps)
    pipe, sampled = Pipeline(texts, model=model, **placement), Pipeline(texts[0], model=model, **placement)
    total = len(texts) * (most + sum(n for _, n in plan)) + most
    with console.progress(total=total, desc="drawing", unit="step") as bar, console.hushed():

        def draw(pipe, sampler: str, n: int, spacing: str | None = None) -> Images:
            settings = {"sampler": sampler, "num_inference_steps": n, "spacing": spacing}
            seeds = list(range(1, len(pipe.prompts) + 1))
            return pipe.generate(num_images=1, seed=seeds, callback=lambda i, x, x0: bar.update(len(x)), **settings)

        reference = draw(pipe, REFERENCE, most, spacing)
        error = rms_difference(draw(sampled, CONTROL, most, spacing), reference[:1])
        drawn = {(name, n): draw(pipe, name, n) for name, n in plan}
    rows = tuple(_row(name, n, schedule, images, reference) for (name, n), images in drawn.items())
    metadata = reference.metadata[0]
    settings = {"model": str(model), "images": len(texts), "prompt": texts[0], "seed": 1}
    settings |= {"guidance_scale": metadata["guidance_scale"], "reference": f"{REFERENCE} with {most} steps"}
    settings |= {"dtype": metadata["dtype"], "device": metadata["device"], "threads": torch.get_num_threads()}
    return Comparison(settings, rows, error, {key: images[0] for key, images in drawn.items()}, reference[0])


def _row(sampler: str, steps: int, schedule: Schedule, images: Images, reference: Images) -> Row:
    evaluations, _ = cost(sampler, schedule.sigmas(steps, sampler))
    adds_noise = cost(sampler, torch.tensor([10.0, 1.0, 0.0]))[1] > 0  # two steps: with one, no sampler adds noise
    distance = None if adds_noise else rms_difference(images, reference)
    return Row(sampler, steps, evaluations, adds_noise, distance, detail(images) / max(detail(reference), 1e-9))


def rms_difference(images: Sequence[Image], references: Sequence[Image]) -> float:
    """RMS difference over pixels in levels of 255 between images and references of the same size: mean of all pairs."""
    pairs = zip(*([np.asarray(image, np.float64) for image in side] for side in (images, references)))
    return float(np.mean([np.sqrt(np.mean((image - reference) ** 2)) for image, reference in pairs]))


def detail(images: Sequence[Image]) -> float:
    """Mean absolute difference of neighbouring pixels, in levels of 255."""
    pixels = np.stack([np.asarray(image, np.float64) for image in images])  # (N, H, W, 3)
    return float((np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean()) / 2)


def _write(folder: Path, comparison: Comparison) -> None:
    atomic_write(folder / "samplers.png", encode(sheet(comparison)))
    atomic_write(folder / "samplers.svg", plot(comparison))
    text = json.dumps(comparison.as_json(), indent=1) + "\n"
    console.say(f"wrote {atomic_write(folder / 'samplers.json', text)}, samplers.png and samplers.svg")
