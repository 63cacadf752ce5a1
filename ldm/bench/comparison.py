"""What the bench of samplers measures, as text and JSON, and which sampler it recommends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from PIL.Image import Image

RULE = (
    "the lowest geometric mean, over budgets of {budgets} evaluations of the network, of the least distance within the "
    "budget, among samplers that add no noise"
)
DETAIL = "detail: mean difference of neighbouring pixels over the reference's; below 1 is blurred, above 1 is noisy"


@dataclass(frozen=True)
class Row:
    """One sampler at one number of steps; means over the images."""

    sampler: str
    steps: int
    evaluations: int  # of the network; the two of guidance count as one
    adds_noise: bool
    distance: float | None  # RMS from the reference in levels of 255; None where the sampler adds noise
    detail: float  # difference of neighbouring pixels, divided by the reference's


@dataclass(frozen=True)
class Comparison:
    """The measurements, and the images of the first prompt by (sampler, steps)."""

    settings: dict[str, Any]
    rows: tuple[Row, ...]
    reference_error: float  # levels of 255: RMS of another solver with as many steps from the reference (first image)
    images: Mapping[tuple[str, int], Image]
    reference: Image

    @property
    def rule(self) -> str:
        """How `recommended` is chosen, in words."""
        return RULE.format(budgets=", ".join(map(str, self.budgets)))

    @property
    def budgets(self) -> list[int]:
        """Evaluations at which samplers are compared: all numbers of steps but the least (two-stage ones lack it)."""
        steps = sorted({row.steps for row in self.rows})
        return steps[1:] or steps

    @property
    def recommended(self) -> str | None:
        """A sampler's name, by `rule`; None where none has a distance within each budget."""
        means = {}
        for name in dict.fromkeys(row.sampler for row in self.rows if row.distance is not None):
            its_rows = [row for row in self.rows if row.sampler == name]
            least = [min((r.distance for r in its_rows if r.evaluations <= b), default=math.inf) for b in self.budgets]
            means[name] = sum(math.log(max(d, 1e-9)) for d in least)
        best = min(means, key=means.get, default=None)
        return best if best is not None and math.isfinite(means[best]) else None

    def as_json(self) -> dict[str, Any]:
        """The comparison without its images, as JSON values."""
        head = {"bench": "samplers", "recommended": self.recommended, "rule": self.rule, "settings": self.settings}
        return {**head, "reference_error": self.reference_error, "rows": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        """The comparison as text: the settings, one line for each sampler, and the recommended one."""
        steps = sorted({row.steps for row in self.rows})
        by_steps = {(row.sampler, row.steps): row for row in self.rows}
        lines = ["samplers: " + ", ".join(f"{name} {value}" for name, value in self.settings.items())]
        heads = ("evaluations", "distance", "detail")
        lines.append(f"  {'':20}" + "".join(f"{head:>{7 * len(steps)}} " for head in heads))
        lines.append(f"  {'steps':20}" + ("".join(f"{n:7}" for n in steps) + " ") * len(heads))
        for name in dict.fromkeys(row.sampler for row in self.rows):
            rows = [by_steps.get((name, n)) for n in steps]
            cells = [*(_cell(r and r.evaluations, "7d") for r in rows), " "]
            cells += [*(_cell(r and r.distance, "7.2f") for r in rows), " "]
            cells += [_cell(r and r.detail, "7.2f") for r in rows]
            lines.append(f"  {name:20}" + "".join(cells))
        lines.append("  distance: RMS over pixels, levels of 255, from the reference; none where noise is added")
        lines += [f"  {DETAIL}", f"  the reference itself is uncertain by {self.reference_error:.2f} of 255"]
        return "\n".join([*lines, f"  take {self.recommended or 'no one of these'}: {self.rule}"])


def _cell(value: float | None, form: str) -> str:
    return format("-", ">7") if value is None else format(value, form)
