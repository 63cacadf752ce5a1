"""Captions whose images a model draws before it is trained on them."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.errors import DataError
from ldm.training.settings import DataSettings

FOLDER = "drawn"  # in the run's folder


@dataclass(frozen=True)
class DrawnSet:
    """Images that are still to be drawn, in place of a set of images."""

    data: DataSettings
    prompts: tuple[str, ...]  # one for each image
    name: str  # of the file that they are from

    @property
    def lines(self) -> list[str]:
        different = len(set(self.prompts))
        return [f"{len(self.prompts)} images are drawn by the model, of {different} captions in {self.name}"]

    def within(self, out: Path) -> DataSettings:
        """The settings of the images, once they are drawn into a run's folder."""
        return replace(self.data, folder=str(out / FOLDER), square=True)


def read_prompts(path: str, count: int, data: DataSettings) -> DrawnSet:
    """The captions of a text file, one a line, repeated in their order up to `count` (0: each once).

    Empty lines and those that begin with # are left out. Raises DataError where none is left, or it is no text.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise DataError(f"cannot be read ({what})", where=path) from None
    lines = [line.strip() for line in text.splitlines()]
    captions = [line for line in lines if line and not line.startswith("#")]
    if not captions:
        raise DataError("holds no caption", where=path, hint="write one a line")
    chosen = [captions[i % len(captions)] for i in range(count or len(captions))]
    return DrawnSet(data, tuple(chosen), Path(path).name)
