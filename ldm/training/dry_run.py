"""What a run would do: its settings, and what its remaining steps would take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ldm.console import say
from ldm.training.checkpoints.reading import read_about
from ldm.training.data import DrawnSet, ImageSet, PreparedSet, SceneSet
from ldm.training.finetuning.forecast import measure
from ldm.training.finetuning.options import flatten
from ldm.training.forecast import forecast_lines
from ldm.training.settings import FinetuneSettings, Settings, UNetSettings, as_dict


def print_dry_run(
    settings: Settings, out: Path, images: ImageSet | PreparedSet | SceneSet | DrawnSet, checkpoint: Path | None
) -> None:
    """Print the settings, what there is to train on, and what the remaining steps would take."""
    done = read_about(checkpoint)["step"] if checkpoint else 0
    if checkpoint:
        say(f"would resume {checkpoint.name}: {max(0, settings.steps - done)} of {settings.steps} steps are left")
    lines = [f"{name}: {value}" for name, value in flatten(as_dict(settings)).items()]
    left = max(0, settings.steps - done)
    if settings.stage != "finetune":
        lines += images.lines
    elif left and isinstance(settings, FinetuneSettings) and isinstance(images, ImageSet):
        lines += measure(dataclasses.replace(settings, steps=left), out, images).lines  # which prints its own counts
    if isinstance(settings, UNetSettings) and left:
        lines += forecast_lines(settings, left)
    say("\n".join(lines))
