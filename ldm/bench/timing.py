"""Timing in alternation, so that other load on the machine slows all sides equally."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ldm import console

Side = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of every side; the first side is ours, the last one the one we compare with."""

    name: str
    seconds: dict[str, list[float]]
    settings: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)  # differences between the results of the sides

    @property
    def medians(self) -> dict[str, float]:
        """Seconds of each side."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @property
    def ratio(self) -> float:
        """Our median divided by the last side's: below 1 we are faster."""
        medians = list(self.medians.values())
        return medians[0] / medians[-1]

    def as_json(self) -> dict[str, Any]:
        """The timing as JSON values."""
        report = {"bench": self.name, "ratio": round(self.ratio, 4), "medians": self.medians, "seconds": self.seconds}
        return {**report, "agreement": self.agreement, "settings": self.settings}

    def text(self) -> str:
        """The timing as text: the settings, a line for each side with median and range, the ratio."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        width = max(map(len, self.seconds))
        lines = [f"{self.name}: {settings}" if settings else self.name]
        for name, values in self.seconds.items():
            middle, low, high = statistics.median(values), min(values), max(values)
            lines.append(f"  {name:{width}}  {middle:8.3f} s  ({low:.3f} to {high:.3f}, {len(values)} times)")
        lines += [f"  {name}: {value:.4g}" for name, value in self.agreement.items()]
        return "\n".join([*lines, f"  ratio {self.ratio:.2f}"])


def alternate(sides: Mapping[str, Side], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side, in alternation, after `warmup` untimed rounds.

    Each side has to wait for its own device, for example by writing an image to the disk: nothing is synchronised here.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in console.progress(range(warmup + repeats), desc="measuring", unit="round"):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def own_process() -> Iterator[Callable[..., Any]]:
    """A function that calls others in one process, which lives as long as this context and has as many threads."""
    import torch

    kind = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, kind, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
