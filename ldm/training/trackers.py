"""TensorBoard and Weights & Biases, through Accelerate's trackers, beside the run's own page."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError
from ldm.training.settings import Settings, as_dict

if TYPE_CHECKING:
    from PIL import Image

# Of each tracker the packages that will do.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trackers(settings: Settings) -> None:
    """Raise ConfigError where the package of a tracker is missing."""
    for name in settings.report_to:
        if not any(map(importlib.util.find_spec, PACKAGES[name])):
            raise ConfigError(f"needs the package {name}", where="report_to", todo=f"pip install {name}")


class Trackers:
    """Those that the settings name, for a run in `out` that begins or goes on at `step`."""

    def __init__(self, settings: Settings, out: Path, step: int):
        self.trackers = []
        if "tensorboard" in settings.report_to:
            from accelerate.tracking import TensorBoardTracker

            # what a killed run wrote of steps that are taken again is hidden by TensorBoard
            self.trackers.append(TensorBoardTracker("tensorboard", out, purge_step=step + 1 if step else None))
        if "wandb" in settings.report_to:
            from accelerate.tracking import WandBTracker

            self.trackers.append(WandBTracker("ldm", name=out.name, id=out.name, resume="allow", dir=str(out)))
        for tracker in self.trackers:
            tracker.start()
        if not step:
            for tracker in self.trackers:
                values = flat(as_dict(settings)).items()
                known = {name: value if isinstance(value, int | float | str) else str(value) for name, value in values}
                tracker.store_init_configuration(known)

    def log(self, values: dict[str, float], step: int) -> None:
        """Numbers by name, of a step."""
        for tracker in self.trackers:
            tracker.log(values, step)

    def picture(self, image: Image.Image, step: int) -> None:
        """The sample grid of a step."""
        import numpy as np

        for tracker in self.trackers:
            own = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step, **own)

    def finish(self) -> None:
        """Write what is pending."""
        for tracker in self.trackers:
            tracker.finish()


def flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings on one level, as KEY=VALUE names them: {"data.folder": …}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) and value else {above + name: value}
    return found
