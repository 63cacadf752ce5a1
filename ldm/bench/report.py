"""All benches by name, and the function that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ldm.bench.cold import cold
from ldm.bench.rendering import rendering
from ldm.bench.samplers import Comparison, samplers
from ldm.bench.shortcuts import shortcuts
from ldm.bench.timing import Timing
from ldm.bench.training import training
from ldm.bench.warm import warm
from ldm.errors import ConfigError, nearest

BENCHES: dict[str, Callable[..., Timing | Comparison]]
BENCHES = {"cold": cold, "warm": warm, "render": rendering, "training": training, "samplers": samplers}
BENCHES["shortcuts"] = shortcuts
TIMINGS = ("cold", "warm")  # run by default; the others take minutes


def bench(names: Sequence[str] = (), **settings: Any) -> list[Timing | Comparison]:
    """Run benches by name (by default the timings) and return their results; each gets the settings that it has.

    Raises ConfigError for an unknown bench or setting.
    """
    for name in names:
        if name not in BENCHES:
            raise ConfigError(f"unknown bench {name!r}", where="bench", hint=nearest(name, BENCHES))
    repeats = settings.get("repeats", 1)
    if repeats < 1:
        raise ConfigError(f"must be at least 1, got {repeats}", where="repeats")
    chosen = {name: call for name, call in BENCHES.items() if name in (names or TIMINGS)}
    accepted = {name: inspect.signature(call).parameters for name, call in chosen.items()}
    for key in settings:
        if not any(key in parameters for parameters in accepted.values()):
            known = [name for parameters in accepted.values() for name in parameters]
            raise ConfigError(f"unknown setting {key!r}", where="bench", hint=nearest(key, known))
    return [
        call(**{key: value for key, value in settings.items() if key in accepted[name]})
        for name, call in chosen.items()
    ]
