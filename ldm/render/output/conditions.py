"""What ControlNets saw of rendered images, beside these: conditions/NAME.png, of a second one conditions-2/NAME.png.

Folders of equal names, as training a ControlNet reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ldm import console
from ldm.errors import ConfigError
from ldm.files import atomic_write
from ldm.images import encode
from ldm.pipeline.control import check_controls
from ldm.render.jobs.jobs import short
from ldm.render.output.lines import DONE, is_inside, last_lines


def write_conditions(folder: Path, keys: Iterable[int]) -> int:
    """Write those of all drawn images among the jobs `keys` that have control images; returns how many.

    They are made anew of the control images; where one is gone, that is told and the others are written.
    """
    wanted, count = set(keys), 0
    for line in last_lines(folder):
        settings = line.get("settings") or {}
        drawn = line["status"] == DONE and short(line["key"]) in wanted and is_inside(line.get("path"))
        if not drawn or not settings.get("control_image"):
            continue
        try:
            controls = check_controls(settings, 1, 1)
        except ConfigError as error:
            console.warn(f"{line['path']}: no condition is kept: {error}")
            continue
        assert controls is not None  # as there are control images
        for i, image in enumerate(controls.each[0]):
            path = folder / (f"conditions-{i + 1}" if i else "conditions") / f"{Path(line['path']).stem}.png"
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, encode(image.condition(settings["height"], settings["width"]), "png"))
            count += 1
    return count
