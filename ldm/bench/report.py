"""All benches by name, and running them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ldm.bench.cold import cold
from ldm.bench.timing import Timing
from ldm.bench.warm import warm
from ldm.errors import ConfigError, nearest

BENCHES: dict[str, Callable[..., Timing]] = {"cold": cold, "warm": warm}


def bench(names: Sequence[str] = (), repeats: int = 5, **settings: Any) -> list[Timing]:
    """Run benches (all of them without names) and return their timings; `settings` go to those that take them.

    Raises ConfigError for an unknown bench or setting.
    """
    import inspect

    for name in names:
        if name not in BENCHES:
            raise ConfigError(f"unknown bench {name!r}", where="bench", todo=nearest(name, BENCHES))
    if repeats < 1:
        raise ConfigError(f"must be at least 1, got {repeats}", where="repeats")
    chosen = {name: call for name, call in BENCHES.items() if not names or name in names}
    taken = {name: inspect.signature(call).parameters for name, call in chosen.items()}
    for key in settings:
        if not any(key in parameters for parameters in taken.values()):
            known = [name for parameters in taken.values() for name in parameters]
            raise ConfigError(f"unknown setting {key!r}", where="bench", todo=nearest(key, known))
    return [
        call(repeats=repeats, **{key: value for key, value in settings.items() if key in taken[name]})
        for name, call in chosen.items()
    ]
