"""Us against diffusers, side by side: pictures compared first, then times in alternation; and samplers, compared."""

_LAZY = {"bench": "report", "BENCHES": "report", "alternate": "timing", "Timing": "timing"}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
