"""Samplers beside each other: a picture by each at few steps, and how far each is from what it comes nearer to.

Samplers that add no noise solve one differential equation, so that a seed has one picture that all of them come nearer
to; a solver of third order with 1,000 steps stands for it. Samplers that add noise have no such picture (with other
steps they draw other noise), and are given no distance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.config import require
from ldm.diffusion.names import check, resolve
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import ConfigError
from ldm.files import atomic_write, require_writable

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from ldm.diffusion.schedule import Schedule
    from ldm.pipeline.result import Images

STEPS = (4, 8, 16, 32)
REFERENCE, CONTROL, REFERENCE_STEPS = "unipc", "dpmpp_2m", 1000  # both go with every kind of model
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
RULE = (
    "the lowest geometric mean, over budgets of {budgets} evaluations of the network, of the least distance within the "
    "budget, among samplers that add no noise"
)
NEIGHBOURS = "detail: mean difference of neighbouring pixels by the reference's; below 1 is blurred, above 1 is noisy"


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps; means over the pictures."""

    sampler: str
    steps: int
    evaluations: int  # of the network, guidance's two halves being one
    adds_noise: bool
    distance: float | None  # from the reference, RMS over pixels in levels of 255; None where the sampler adds noise
    detail: float  # difference of neighbouring pixels, by the reference's


@dataclass(frozen=True)
class Comparison:
    """What was measured, and the pictures of the first prompt by (sampler, steps)."""

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    reference_error: float  # of 255: how far another solver with as many steps is from the reference (first picture)
    pictures: Mapping[tuple[str, int], Image]
    reference: Image

    @property
    def rule(self) -> str:
        """How `recommended` is chosen, in words."""
        return RULE.format(budgets=", ".join(map(str, self.budgets)))

    @property
    def budgets(self) -> list[int]:
        """Evaluations that are compared: all numbers of steps but the least, at which two-stage samplers have none."""
        steps = sorted({row.steps for row in self.rows})
        return steps[1:] or steps

    @property
    def recommended(self) -> str | None:
        """A sampler's name, by `rule`; None where none has a distance within each budget."""
        means = {}
        for name in dict.fromkeys(row.sampler for row in self.rows if row.distance is not None):
            own = [row for row in self.rows if row.sampler == name]
            least = [min((r.distance for r in own if r.evaluations <= b), default=math.inf) for b in self.budgets]
            means[name] = sum(math.log(max(d, 1e-9)) for d in least)
        best = min(means, key=means.get, default=None)
        return best if best is not None and math.isfinite(means[best]) else None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        told = {"bench": "samplers", "recommended": self.recommended, "rule": self.rule, "settings": self.settings}
        return {**told, "reference_error": self.reference_error, "rows": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        """Lines for people: the settings, a line a sampler with what was measured, and which to take."""
        steps = sorted({row.steps for row in self.rows})
        found = {(row.sampler, row.steps): row for row in self.rows}
        lines = ["samplers: " + ", ".join(f"{name} {value}" for name, value in self.settings.items())]
        heads = ("evaluations", "distance", "detail")
        lines.append(f"  {'':20}" + "".join(f"{head:>{7 * len(steps)}} " for head in heads))
        lines.append(f"  {'steps':20}" + ("".join(f"{n:7}" for n in steps) + " ") * len(heads))
        for name in dict.fromkeys(row.sampler for row in self.rows):
            rows = [found.get((name, n)) for n in steps]
            cells = [*(_cell(r and r.evaluations, "7d") for r in rows), " "]
            cells += [*(_cell(r and r.distance, "7.2f") for r in rows), " "]
            cells += [_cell(r and r.detail, "7.2f") for r in rows]
            lines.append(f"  {name:20}" + "".join(cells))
        lines.append("  distance: RMS over pixels, levels of 255, from the reference; none where noise is added")
        lines += [f"  {NEIGHBOURS}", f"  the reference itself is uncertain by {self.reference_error:.2f} of 255"]
        return "\n".join([*lines, f"  take {self.recommended or 'no one of these'}: {self.rule}"])


def samplers(
    model: str | Path = "default",
    prompts: int = len(PROMPTS),
    steps: int | Sequence[int] = STEPS,
    sampler: str | Sequence[str] | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    out: str | Path | None = None,
) -> Comparison:
    """Draw `prompts` pictures, the i-th with seed i, with every sampler that goes with the model, and compare them.

    steps    numbers of steps
    sampler  names, or one text with commas, in place of all samplers
    out      a folder for samplers.png (the first prompt's pictures), samplers.svg (the distances) and samplers.json

    Raises ConfigError before anything is drawn, ResourceError where `out` cannot be written, ModelError for the model.
    """
    from ldm.checkpoint import load_model
    from ldm.pipeline import Pipeline
    from ldm.pipeline.checks import check_int

    prompts = check_int(prompts, "prompts", 1, MAX_PROMPTS)
    listed = [steps] if isinstance(steps, int) else steps
    steps = sorted({check_int(n, "steps", 1, REFERENCE_STEPS) for n in listed})
    if out is not None:
        require_writable(out)
    texts, place = [PROMPTS[i % len(PROMPTS)] for i in range(prompts)], {"dtype": dtype, "device": device}
    pipe = Pipeline(texts, model=model, **place)
    schedule = load_model(model, device=pipe.device, dtype=pipe.dtype).schedule  # the pipeline's own: loaded once
    plan = [(name, n) for name in _chosen(sampler, schedule) for n in steps if _possible(schedule, name, n)]
    require(len(plan) > 0, f"no sampler can take {', '.join(map(str, steps))} steps with this model", "steps")
    found = _compare(model, texts, schedule, plan, **place)
    if out is not None:
        _write(Path(out), found)
    return found


def cost(sampler: str, sigmas: Tensor) -> tuple[int, int]:
    """(evaluations of the network, draws of noise) of one run over `sigmas` (n + 1,), counted on a single pixel."""
    import torch

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
    """Our names of the samplers asked for, or of all that go with the model; ConfigError for one that does not."""
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
    """Whether the model's schedule has so many steps for a sampler (lcm has 50)."""
    try:
        schedule.sigmas(steps, sampler)
    except ConfigError:
        return False
    return True


def _cell(value: float | None, form: str) -> str:
    return format("-", ">7") if value is None else format(value, form)


def _compare(
    model: str | Path, texts: Sequence[str], schedule: Schedule, plan: Sequence[tuple[str, int]], **place: str
) -> Comparison:
    """One run of the bench: the reference, the control of the first picture, then the plan, under one bar."""
    import torch

    from ldm.pipeline import Pipeline

    # Of the betas' spacings the one that visits every timestep that the model was trained with, whatever its own is
    spacing = None if schedule.is_flow else "trailing"
    most = REFERENCE_STEPS if schedule.is_flow else min(REFERENCE_STEPS, schedule.num_train_timesteps)
    pipe, first = Pipeline(texts, model=model, **place), Pipeline(texts[0], model=model, **place)
    total = len(texts) * (most + sum(n for _, n in plan)) + most
    with console.progress(total=total, desc="drawing", unit="step") as bar, console.hushed():

        def draw(pipe, sampler: str, n: int, spacing: str | None = None) -> Images:
            settings = {"sampler": sampler, "num_inference_steps": n, "spacing": spacing}
            seeds = list(range(1, len(pipe.prompts) + 1))
            return pipe.generate(num_images=1, seed=seeds, callback=lambda i, x, x0: bar.update(len(x)), **settings)

        reference = draw(pipe, REFERENCE, most, spacing)
        error = apart(draw(first, CONTROL, most, spacing), reference[:1])
        drawn = {(name, n): draw(pipe, name, n) for name, n in plan}
    rows = tuple(_row(name, n, schedule, pictures, reference) for (name, n), pictures in drawn.items())
    record = reference.metadata[0]
    told = {"model": str(model), "pictures": len(texts), "prompt": texts[0], "seed": 1}
    told |= {"guidance_scale": record["guidance_scale"], "reference": f"{REFERENCE} with {most} steps"}
    told |= {"dtype": record["dtype"], "device": record["device"], "threads": torch.get_num_threads()}
    return Comparison(told, rows, error, {key: pictures[0] for key, pictures in drawn.items()}, reference[0])


def _row(sampler: str, steps: int, schedule: Schedule, pictures: Images, reference: Images) -> Row:
    import torch

    evaluations, _ = cost(sampler, schedule.sigmas(steps, sampler))
    adds_noise = cost(sampler, torch.tensor([10.0, 1.0, 0.0]))[1] > 0  # not of one step, where none adds any
    distance = None if adds_noise else apart(pictures, reference)
    return Row(sampler, steps, evaluations, adds_noise, distance, detail(pictures) / max(detail(reference), 1e-9))


def apart(pictures: Sequence[Image], others: Sequence[Image]) -> float:
    """How far pictures are from others of the same size: RMS over pixels in levels of 255, the mean of all pairs."""
    import numpy as np

    both = [(np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in zip(pictures, others)]
    return float(np.mean([np.sqrt(np.mean((one - other) ** 2)) for one, other in both]))


def detail(pictures: Sequence[Image]) -> float:
    """Mean absolute difference of neighbouring pixels, in levels of 255."""
    import numpy as np

    pixels = np.stack([np.asarray(picture, np.float64) for picture in pictures])  # (N, H, W, 3)
    return float((np.abs(np.diff(pixels, axis=1)).mean() + np.abs(np.diff(pixels, axis=2)).mean()) / 2)


def _write(folder: Path, found: Comparison) -> None:
    from ldm.bench.sheet import plot, sheet
    from ldm.images import encode

    atomic_write(folder / "samplers.png", encode(sheet(found)))
    atomic_write(folder / "samplers.svg", plot(found))
    text = json.dumps(found.record(), indent=1) + "\n"
    console.say(f"wrote {atomic_write(folder / 'samplers.json', text)}, samplers.png and samplers.svg")
