"""What some settings need of this machine beside PyTorch."""

from __future__ import annotations

import importlib.util

from ldm.config import require
from ldm.device import missing_compiler, pick_device
from ldm.errors import ConfigError
from ldm.training.loop.trackers import check_trackers
from ldm.training.settings import Settings


def check_means(settings: Settings) -> None:
    """Raise ConfigError if this machine lacks fp16, a compiler, or the package of an optimizer or a tracker."""
    device = pick_device(settings.device)
    fits = settings.precision != "fp16" or device.type == "cuda"
    require(fits, f"fp16 is for CUDA, not for {device.type}: use bf16 or fp32", "precision")
    there = settings.optimizer != "adamw8bit" or importlib.util.find_spec("bitsandbytes") is not None
    require(there, "adamw8bit needs a package: pip install bitsandbytes, or use adamw", "optimizer")
    if getattr(settings, "compile", False) and (missing := missing_compiler(device)):
        raise ConfigError(f"needs {missing}", where="compile", hint="install it, or leave compile=false")
    if settings.report_to:
        check_trackers(settings)
