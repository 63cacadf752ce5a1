"""Values that other tools write in another form than the settings have it: texts for lists, files of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.console import say
from ldm.errors import ConfigError
from ldm.training.settings import MAX_SAMPLES


def _read_prompts(path: Any, name: str) -> list[str]:
    """The prompts of a text file: one a line, without kohya's options; # begins a comment."""
    try:
        text = Path(str(path)).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or "is no UTF-8 text"
        raise ConfigError(f"cannot be read ({what})", where=f"prompts file {path}") from None
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    prompts = [prompt for line in lines if (prompt := f" {line}".partition(" --")[0].strip())]
    if any(" --" in line for line in lines):
        say(f"{path}: options in its lines (--w, --s, …) are ignored: the grid is drawn as the settings say")
    if not prompts:
        raise ConfigError("holds no prompt", where=f"prompts file {path}", hint="write one a line")
    return prompts


def _resolution(value: Any, name: str) -> Any:
    """kohya's 512,512 is 512."""
    sides = value.split(",") if isinstance(value, str) else value
    if not isinstance(sides, (list, tuple)) or len(sides) != 2:
        return value
    width, height = (side.strip() if isinstance(side, str) else side for side in sides)
    if width != height:
        hint = "give one: each image gets a bucket of its own shape, with about as many pixels as that square"
        raise ConfigError(f"is one number of pixels, got {value!r:.80}", where=name, hint=hint)
    return int(width) if isinstance(width, str) and width.isdecimal() and len(width) < 9 else width


def _betas(value: Any, name: str) -> Any:
    """0.9,0.99 is [0.9, 0.99]."""
    try:
        return [float(part) for part in value.split(",")] if isinstance(value, str) else value
    except ValueError:
        return value


def _widths(value: Any, name: str) -> Any:
    """48,96 is [48, 96]."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else []
    return [int(part) for part in parts] if parts and all(p.isdecimal() and len(p) < 9 for p in parts) else value


def _parts(value: Any, name: str) -> Any:
    """attn,conv is ["attn", "conv"]."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _patterns(value: Any, name: str) -> Any:
    """ "a/*,b" is ["a/*", "b"], and so is what is given several times."""
    texts = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
    return [part.strip() for text in texts for part in str(text).split(",") if part.strip()]


def _trackers(value: Any, name: str) -> Any:
    return [] if value in ("none", "") else _parts(value, name)


def _several(value: Any, name: str) -> Any:
    items = [value] if isinstance(value, str) else value
    return [str(one) if isinstance(one, Path) else one for one in items] if isinstance(items, list | tuple) else items


# By the name of the option: its value, which is no number or switch, in the form that the settings have.
READERS: dict[str, Callable[[Any, str], Any]] = {
    "prompts_file": _read_prompts,
    "validation_prompts": _several,
    "text_encoders": _several,
    "report_to": _trackers,
    "targets": _parts,
    "exclude": _patterns,
    "resolution": _resolution,
    "betas": _betas,
    "control_channels": _widths,
    "control_embedding": _widths,
}


def repeated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' scripts draw num_validation_images of each prompt."""
    count, prompts = settings["samples"], settings.get("validation_prompts")
    if not prompts or type(count) is not int or count < 1:
        return {}
    return {"validation_prompts": [prompt for prompt in prompts for _ in range(min(count, MAX_SAMPLES))]}


def is_same(value: Any, neutral: str | bool | None) -> bool:
    """Whether a value is the neutral one, as text too."""
    if isinstance(neutral, (bool, type(None))):
        return value is neutral or (isinstance(value, str) and value.lower() == str(neutral).lower())
    if isinstance(value, str) and value.strip() == neutral:
        return True
    try:
        return not isinstance(value, bool) and float(value) == float(neutral)
    except (TypeError, ValueError, OverflowError):
        return False
