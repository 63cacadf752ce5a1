"""Benchmarks: against diffusers, images compared first and then timed in alternation; and all samplers compared."""

_LAZY = {"bench": "report", "BENCHES": "report", "ROWS": "report", "alternate": "timing", "Timing": "timing"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
