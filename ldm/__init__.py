"""A small latent text-to-image diffusion stack: train from nothing, fine-tune, render."""

__version__ = "0.1.0"

_LAZY = {"Pipeline": "ldm.pipeline", "train": "ldm.training", "evaluate": "ldm.evaluation"}  # name -> room
_LAZY["finetune"] = _LAZY["distill"] = "ldm.training"
_LAZY["inspect"] = "ldm.checkpoint.inspect"
_LAZY["convert"] = "ldm.checkpoint.convert"
_LAZY["check_data"] = "ldm.training.finetuning.data_check"
_LAZY["verify"] = "ldm.render.replay.verify"
_LAZY["doctor"] = "ldm.bench.machine"
_LAZY["web"] = "ldm.web"
_LAZY["render"] = (
    "ldm.render.drawing.runner"  # the package ldm.render, which takes the name once imported, calls the same
)


def __getattr__(name: str):
    """Public names, imported when they are first asked for: `import ldm` itself costs nothing."""
    if name not in _LAZY:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
