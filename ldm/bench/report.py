"""All benches by name, and the function that runs them."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from ldm.bench.cold import cold_row
from ldm.bench.compute import compute
from ldm.bench.networks import SIZES, lora_row, unet_row, vae_row
from ldm.bench.rendering import render_row
from ldm.bench.samplers import samplers
from ldm.bench.shortcuts import shortcuts
from ldm.bench.table import Result
from ldm.bench.timing import OURS, Row, Timing, measure
from ldm.bench.training import training_row
from ldm.bench.warm import warm_row
from ldm.errors import ConfigError, nearest

REPEATS = 5
QUICK_SECONDS = 105.0  # of all rows with `quick`: with starting, two minutes
OF_ROWS = {"repeats", "quick", "profile"}
# What a machine is measured by, in this order; each says what its sides are.
ROWS: dict[str, Callable[..., Row]] = {"cold": cold_row, "warm": warm_row, "render": render_row}
ROWS |= {f"unet-{size}": partial(unet_row, size) for size in SIZES}
ROWS |= {"vae": vae_row, "training": training_row}
ROWS |= {f"lora-{size}": partial(lora_row, size) for size in SIZES}
# Seconds of a row with `quick`, about, on two cores of Zen 4 (by processor time), in the order of measuring.
ROW_SECONDS = {"cold": 24, "warm": 5, "render": 8, "vae": 4, "training": 7, "unet-sd15": 6, "lora-sd15": 9}
ROW_SECONDS |= {"unet-xl": 6, "unet-sd21": 6, "lora-xl": 9, "lora-sd21": 9}
COMPARISONS: dict[str, Callable[..., Result]] = {"samplers": samplers, "shortcuts": shortcuts, "compute": compute}
BENCHES: dict[str, Callable[..., Any]] = {**ROWS, **COMPARISONS}


def bench(names: Sequence[str] = (), **settings: Any) -> list[Result]:
    """Run benches by name (by default all ROWS) and return their results; each gets the settings that it has.

    repeats  timed rounds; with `quick` one, all sizes are small, and where no bench is named those rows are left out
             that two minutes have no room for
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
    rows = in_time(calls) if settings.get("quick") and not names else (call() for call in calls.values())
    results: list[Result] = []
    for result in rows:
        results.append(result)
        show(result)
    return results


def in_time(calls: Mapping[str, Callable[[], Any]]) -> Iterator[Any]:
    """The results of these rows, quickly measured, as long as there is time; of the others that there was none.

    What a row will take is what it took on two cores of Zen 4, times what this machine has taken more for the last.
    """
    start, pace = time.monotonic(), 1.0
    for name in sorted(calls, key=list(ROW_SECONDS).index):
        began = time.monotonic()
        if began - start + pace * ROW_SECONDS[name] > QUICK_SECONDS:
            yield Timing(name, {}, left_out={OURS: f"no time left (ldm bench {name} --quick measures it)"})
            continue
        yield calls[name]()
        pace = (time.monotonic() - began) / ROW_SECONDS[name]
