"""Measuring what a model draws: lists of prompts, a judge without a network, scores."""

_LAZY = {  # name -> module; heavy libraries are imported when one is asked for
    "evaluate": "scores",
    "evaluate_text": "readers",
    "judge_images": "judged",
    "judge_scenes": "scores",
    "summary": "scores",
    "Judge": "judge",
    "Verdict": "judge",
    "LISTS": "lists",
    "Prompt": "lists",
    "open_list": "lists",
    "real_images": "real",
    "shared_judge": "judge",
}
_RENAMED = {"judge_pictures": "judge_images", "real_pictures": "real_images"}  # old names


def __getattr__(name: str):
    name = _RENAMED.get(name, name)
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
