"""All benches by name, and the function that runs them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ldm.bench.cold import cold_row
from ldm.bench.networks import SIZES, lora_row, unet_row, vae_row
from ldm.bench.rendering import render_row
from ldm.bench.samplers import Comparison, samplers
from ldm.bench.shortcuts import shortcuts
from ldm.bench.timing import Row, Timing, measure
from ldm.bench.training import training_row
from ldm.bench.warm import warm_row
from ldm.errors import ConfigError, nearest

REPEATS = 5
OF_ROWS = {"repeats", "quick", "profile"}
# What a machine is measured by, in this order; each says what its sides are.
ROWS: dict[str, Callable[..., Row]] = {"cold": cold_row, "warm": warm_row, "render": render_row}
ROWS |= {f"unet-{size}": partial(unet_row, size) for size in SIZES}
ROWS |= {"vae": vae_row, "training": training_row}
ROWS |= {f"lora-{size}": partial(lora_row, size) for size in SIZES}
COMPARISONS: dict[str, Callable[..., Timing | Comparison]] = {"samplers": samplers, "shortcuts": shortcuts}
BENCHES: dict[str, Callable[..., Any]] = {**ROWS, **COMPARISONS}


def bench(names: Sequence[str] = (), **settings: Any) -> list[Timing | Comparison]:
    """Run benches by name (by default all ROWS) and return their results; each gets the settings that it has.

    repeats  timed rounds; with `quick` one, and all sizes are small
    profile  print the operators that take longest
    show     a function that is called with each result as soon as it is there

    Raises ConfigError for an unknown bench or setting, and what the rows raise, before anything is measured.
    """
    for name in names:
        if name not in BENCHES:
            raise ConfigError(f"unknown bench {name!r}", where="bench", hint=nearest(name, BENCHES))
    repeats = settings.get("repeats")
    if repeats is not None and repeats < 1:
        raise ConfigError(f"must be at least 1, got {repeats}", where="repeats")
    show = settings.pop("show", lambda result: None)
    chosen = {name: call for name, call in BENCHES.items() if name in (names or ROWS)}
    accepted = {name: inspect.signature(call).parameters for name, call in chosen.items()}
    for key in settings.keys() - (OF_ROWS if chosen.keys() & ROWS.keys() else ()):
        if not any(key in parameters for parameters in accepted.values()):
            known = [name for parameters in accepted.values() for name in parameters]
            raise ConfigError(f"unknown setting {key!r}", where="bench", hint=nearest(key, known))
    calls = {}
    for name, call in chosen.items():
        given = {key: value for key, value in settings.items() if key in accepted[name]}
        if name in ROWS:
            times = repeats or (1 if settings.get("quick") else REPEATS)
            calls[name] = partial(measure, call(**given), times, settings.get("profile", False))
        else:
            calls[name] = partial(call, **given)
    results = []
    for call in calls.values():
        results.append(call())
        show(results[-1])
    return results
