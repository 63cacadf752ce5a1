"""Parsers of a prompt line's values for what works beside the model: LoRAs, ControlNets, IP-Adapters (see `values`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import require
from ldm.control import ALIASES, KINDS
from ldm.errors import ConfigError
from ldm.pipeline.checks import check_int
from ldm.pipeline.keywords import adapter_scales as parse_scales
from ldm.render.prompts.values import Parser, factor, model, number, path


def several(parser: Parser, commas: bool = False) -> Parser:
    """A parser of one value or a list of them, and with `commas` of a text that holds several: a tuple."""

    def parse(value: Any, word: str, folder: Path) -> tuple[Any, ...]:
        value = value.split(",") if commas and isinstance(value, str) else value
        return tuple(parser(item, word, folder) for item in (value if isinstance(value, (list, tuple)) else [value]))

    return parse


def loras(value: Any, word: str, folder: Path) -> tuple[tuple, ...]:
    """((path, weight), …) from FILE, FILE:WEIGHT, [FILE, …], [[FILE, WEIGHT], …] or {FILE: WEIGHT}.

    [FILE, WEIGHT, WEIGHT] has the text encoder's weight too, and becomes (path, weight, text encoder's weight).
    """
    if isinstance(value, Mapping):
        value = [list(item) for item in value.items()]
    pairs = []
    for item in value if isinstance(value, (list, tuple)) else [value]:
        file, *weights = item if isinstance(item, (list, tuple)) and len(item) in (2, 3) else (item, 1.0)
        name, colon, tail = file.rpartition(":") if isinstance(file, str) else ("", "", "")
        if name and colon and isinstance(number(tail), (int, float)):
            file, weights = name, [number(tail)]
        parsed = list(map(number, weights))
        for weight, found in zip(weights, parsed):
            good = isinstance(found, (int, float)) and not isinstance(found, bool) and abs(found) <= 1000
            require(good, f"the weight {weight!r:.80} is no number within -1000 to 1000", word)
        pairs.append((path(file, word, folder), *map(float, parsed)))
    require(len(pairs) > 0, "the list is empty", word)
    return tuple(pairs)


def control_image(value: Any, word: str, folder: Path) -> str:
    """FILE or KIND:FILE, as generate takes them."""
    kind, colon, tail = value.partition(":") if isinstance(value, str) else ("", "", "")
    made = bool(colon) and kind in (*KINDS, *ALIASES)
    return f"{kind}:{path(tail, word, folder)}" if made else path(value, word, folder)


def control(value: Any, word: str, folder: Path) -> tuple[tuple[Any, ...], ...]:
    """(control, control_image, controlnet_conditioning_scale) from KIND:FILE or KIND:FILE:WEIGHT.

    control is the kind, whose ControlNet of the model is taken where no other is given: see `with_own_controls`.
    """
    kind, _, tail = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in (*KINDS, *ALIASES) or not tail:
        hint = f"KIND:FILE or KIND:FILE:WEIGHT; kinds: {', '.join(KINDS)}"
        raise ConfigError(f"expected such as edges:photo.png:0.8, got {value!r:.80}", where=word, hint=hint)
    file, _, weight = tail.rpartition(":")
    scale = number(weight)
    if not file or not isinstance(scale, (int, float)):
        file, scale = tail, 1.0
    image = control_image(f"{kind}:{file}", word, folder)
    return (ALIASES.get(kind, kind),), (image,), (factor(scale, word, folder),)


def mode(value: Any, word: str, folder: Path) -> Any:
    """A kind of condition by its number, or those of one union, from "3+1" or [3, 1]; None (or -) is for a ControlNet
    without kinds."""
    value = value.split("+") if isinstance(value, str) and "+" in value else value
    if isinstance(value, (list, tuple)):
        return tuple(mode(one, word, folder) for one in value)
    value = value.strip() if isinstance(value, str) else value
    return None if value in (None, "-") else check_int(number(value), word, 0, 1000)


def shown_image(value: Any, word: str, folder: Path) -> Any:
    """An image of an IP-Adapter, or a list of them."""
    return paths(value, word, folder) if isinstance(value, (list, tuple)) else path(value, word, folder)


def adapter_scales(value: Any, word: str, folder: Path) -> tuple[Any, ...]:
    """How much each IP-Adapter does, from 0.6, "0.6,0.4", a list, or a mapping of levels, which may be JSON."""
    value = parse_scales(value, word) if isinstance(value, str) else value
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


control_images, controlnets, paths, image_lists = map(several, (control_image, model, path, shown_image))
numbers, modes = several(factor, commas=True), several(mode, commas=True)
