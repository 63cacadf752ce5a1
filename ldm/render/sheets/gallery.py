"""A gallery of a rendered folder: one HTML page beside the images, without server, network or foreign script."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ldm.files import atomic_write
from ldm.render.output.folder import failures, finished
from ldm.render.prompts.setting_table import SETTINGS
from ldm.report import html_page

PAGE = "index.html"
ENTITIES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # so that no text ends the element it stands in


def write_gallery(folder: str | os.PathLike, title: str | None = None) -> Path:
    """Write FOLDER/index.html over that of before and return its path; `title` is the folder's name unless it is given.

    Every image of the folder's manifests, with search, its settings on click and a command that draws it again; and
    all failures. Raises ConfigError where the folder was not rendered, ResourceError where it cannot be written.
    """
    folder = Path(folder)
    title = title if title is not None else folder.resolve().name
    return atomic_write(folder / PAGE, _page(title, _data(folder, title)))


def _page(title: str, data: object) -> str:
    """The page: its script finds `data` in #data, as JSON without NaN, and sets texts as text, never as HTML.

    The browser runs this very script and style, shows images from where the page is, and nothing else.
    """
    folder = resources.files(__package__)
    style, body, script = ("\n" + (folder / f"gallery.{kind}").read_text("utf-8") for kind in ("css", "html", "js"))
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    text = re.sub("[<>&]", lambda mark: ENTITIES[mark[0]], text)
    body += f'\n<script type="application/json" id="data">{text}</script>'
    return html_page(title, body, style, images="'self' file:", script=script)


def _data(folder: Path, title: str) -> dict[str, Any]:
    """What the script shows; settings that all images share are there once."""
    lines = finished(folder)
    every = [{name: _plain(value) for name, value in line["settings"].items()} for line in lines]
    common = dict(every[0]) if every else {}
    for settings in every:
        common = {name: value for name, value in common.items() if name in settings and settings[name] == value}
    common.pop("prompt", None)
    images = [
        {
            "number": line.get("index"),
            "file": line["path"],
            "url": quote(line["path"]),
            "where": line.get("where"),
            "settings": {"prompt": ""} | {name: value for name, value in settings.items() if name not in common},
            "command": command(line["settings"] | allowed(line), line["path"]),
        }
        for line, settings in zip(lines, every)
    ]
    return {"title": title, "common": common, "images": images, "failures": failures(folder)}


def allowed(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest's line has beside its settings and an image is drawn again with."""
    return {"allow_unapplied": True} if line.get("allow_unapplied") is True else {}


def _plain(value: Any) -> str | int | float | None:
    """A setting as the page shows it and searches in it."""
    if isinstance(value, (str, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(str(_plain(item)) for item in value)
    return str(value)


def _are_pairs(loras: Any) -> bool:
    """Whether each LoRA is (path, weight): the option has no other weight for the text encoder."""
    return isinstance(loras, (list, tuple)) and all(len(item) == 2 for item in loras)


def command(settings: Mapping[str, Any], file: str) -> str:
    """A shell command that draws an image again from its settings: `ldm generate --seed 7 … -- 'a cat'`.

    Where the table has no option for one of them: from the image's file, whose folder the shell has to be in.
    """
    words = []
    for name, value in settings.items():
        if name == "prompt" or value is None:
            continue
        option = SETTINGS[name].option if name in SETTINGS else None
        several = isinstance(value, (list, tuple))
        if option is None or isinstance(value, Mapping) or (name == "lora" and not _are_pairs(value)):
            return f"ldm generate --from {shlex.quote(file if not file.startswith('-') else f'./{file}')}"
        if name == "lora":
            words += [f"{option}={path}:{weight!r}" for path, weight in value]
        elif several and name.endswith("interval"):
            words += [option, *map(str, value)]
        else:
            words.append(f"{option}={','.join(map(str, value)) if several else value}")
    if settings.get("negative_prompt", "") is None:  # with XL other than ""; only the file can say it
        return command({"prompt": "", "from the file": 1}, file)
    return shlex.join(["ldm", "generate", *words, "--", str(settings.get("prompt", ""))])
