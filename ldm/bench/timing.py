"""Taking times in alternation, so that what else the machine does falls on every side alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldm import console

Side = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """What was measured: seconds of every repetition of every side; the first side is ours, the last the other's."""

    name: str
    seconds: dict[str, list[float]]
    settings: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)  # how far the results of the sides are apart

    @property
    def medians(self) -> dict[str, float]:
        """Seconds a side."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """Our median by the other's: below 1 we are faster."""
        medians = list(self.medians.values())
        return medians[0] / medians[-1]

    def record(self) -> dict[str, Any]:
        """For JSON."""
        found = {"bench": self.name, "ratio": round(self.ratio, 4), "medians": self.medians, "seconds": self.seconds}
        return {**found, "agreement": self.agreement, "settings": self.settings}

    def text(self) -> str:
        """Lines for people: the settings, a line a side with median and range, the ratio."""
        told = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        width = max(map(len, self.seconds))
        lines = [f"{self.name}: {told}" if told else self.name]
        for name, values in self.seconds.items():
            middle, low, high = statistics.median(values), min(values), max(values)
            lines.append(f"  {name:{width}}  {middle:8.3f} s  ({low:.3f} to {high:.3f}, {len(values)} times)")
        lines += [f"  {name}: {value:.4g}" for name, value in self.agreement.items()]
        return "\n".join([*lines, f"  ratio {self.ratio:.2f}"])


def alternate(sides: Mapping[str, Side], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side, one after the other by turns, after `warmup` untimed rounds.

    A side has to wait for its own device, as those do that end with a picture on disk: nothing is synchronised here.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in console.progress(range(warmup + repeats), desc="measuring", unit="round"):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds
