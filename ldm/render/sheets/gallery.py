"""A gallery of a rendered folder: one HTML page beside the pictures, without server, network or foreign script."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.pipeline.keywords import GUIDANCE_OPTIONS
from ldm.render.output.folder import failures, finished
from ldm.render.sheets.gallery_page import page

PAGE = "index.html"
# The options of `ldm generate` that say settings; where a picture has others, its command draws from its file.
SAID = ("model", "vae", "dtype", "negative_prompt", "seed", "guidance_scale", "height", "width", "sampler", "spacing")
SAID += ("timesteps", "sigmas", "eta", "clip_skip", "emphasis", "guidance", "guidance_rescale", *GUIDANCE_OPTIONS)
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in SAID} | {"num_inference_steps": "--steps"}
PAIRS = {"guidance_interval": "--guidance-interval", "guidance_sigma_interval": "--guidance-sigma-interval"}


def write_gallery(folder: str | os.PathLike, title: str | None = None) -> Path:
    """Write FOLDER/index.html over that of before and return its path; `title` is the folder's name unless it is given.

    Every picture of the folder's manifests, with search, its settings on click and a command that draws it again; and
    all failures. Raises ConfigError where the folder was not rendered, ResourceError where it cannot be written.
    """
    from ldm.files import atomic_write

    folder = Path(folder)
    title = title if title is not None else folder.resolve().name
    return atomic_write(folder / PAGE, page(title, _data(folder, title)))


def _data(folder: Path, title: str) -> dict[str, Any]:
    """What the script shows; settings that all pictures share are told once."""
    lines = finished(folder)
    every = [{name: _plain(value) for name, value in line["settings"].items()} for line in lines]
    common = dict(every[0]) if every else {}
    for settings in every:
        common = {name: value for name, value in common.items() if name in settings and settings[name] == value}
    common.pop("prompt", None)
    pictures = [
        {
            "number": line.get("index"),
            "file": line["path"],
            "url": quote(line["path"]),
            "where": line.get("where"),
            "settings": {"prompt": ""} | {name: value for name, value in own.items() if name not in common},
            "command": command(line["settings"], line["path"]),
        }
        for line, own in zip(lines, every)
    ]
    return {"title": title, "common": common, "pictures": pictures, "failures": failures(folder)}


def _plain(value: Any) -> str | int | float | None:
    """A setting as the page shows it and searches in it."""
    if isinstance(value, (str, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_plain(item)) for item in value)
    return str(value)


def command(settings: Mapping[str, Any], picture: str) -> str:
    """A shell command that draws a picture again from its settings: `ldm generate --seed 7 … -- 'a cat'`.

    Where `ldm generate` has no option for one of them: from the file, whose folder the shell has to be in.
    """
    words = []
    for name, value in settings.items():
        if name == "prompt" or value is None:
            continue
        if name in PAIRS and isinstance(value, (list, tuple)):
            words += [PAIRS[name], *map(str, value)]
        elif name == "lora" and isinstance(value, (list, tuple)):
            words += [f"--lora={path}:{weight!r}" for path, weight in value]
        elif name in OPTIONS and not isinstance(value, Mapping):
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(f"{OPTIONS[name]}={text}")
        else:
            return f"ldm generate --from {shlex.quote(picture if not picture.startswith('-') else f'./{picture}')}"
    if settings.get("negative_prompt", "") is None:  # with XL other than ""; only the file can say it
        return command({"prompt": "", "from the file": 1}, picture)
    return shlex.join(["ldm", "generate", *words, "--", str(settings.get("prompt", ""))])
