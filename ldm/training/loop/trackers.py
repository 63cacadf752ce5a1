"""TensorBoard and Weights & Biases, through Accelerate's trackers, beside the run's own page."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import ConfigError
from ldm.files import atomic_write
from ldm.training.settings import Settings, as_dict, flat

if TYPE_CHECKING:
    from PIL import Image

# Of each tracker the packages that will do.
WANDB = ".wandb-id"  # of the run there, in the run's folder
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_trackers(settings: Settings) -> None:
    """Raise ConfigError where the package of a tracker is missing."""
    for name in settings.report_to:
        if not any(map(importlib.util.find_spec, PACKAGES[name])):
            raise ConfigError(f"needs the package {name}", where="report_to", hint=f"pip install {name}")


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

            own = {"name": out.resolve().name, "id": _wandb_id(out, step), "resume": "allow", "dir": str(out)}
            self.trackers.append(WandBTracker("ldm", **own))
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

    def image(self, image: Image.Image, step: int) -> None:
        """The sample grid of a step."""
        import numpy as np

        for tracker in self.trackers:
            own = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step, **own)

    def finish(self) -> None:
        """Write what is pending."""
        for tracker in self.trackers:
            tracker.finish()


def _wandb_id(out: Path, step: int) -> str:
    """Of the run that goes on; of one that begins a new one, so that folders of equal names are not one run there."""
    place = out / WANDB
    if step and place.is_file():
        return place.read_text().strip()
    return atomic_write(place, secrets.token_hex(8)).read_text()
