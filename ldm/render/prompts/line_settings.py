"""What a line of a prompt file may set: every tool's words for the settings of the table, and their checks.

The words that ldm.pipeline.keywords knows are taken from there; those of prompt files alone stand here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm.errors import ConfigError, nearest
from ldm.pipeline.checks import check_int
from ldm.pipeline.keywords import ALIASES, MAX_IMAGES, UNSUPPORTED
from ldm.render.prompts import values
from ldm.render.prompts.setting_table import SETTINGS
from ldm.render.prompts.words import ANY, FILE_WORDS, REFUSED

# Settings of which a line may have several
ADDED = ("lora", "control", "controlnet", "control_image", "controlnet_conditioning_scale")
ADDED += ("ip_adapter", "ip_adapter_image", "ip_adapter_scale", "ip_adapter_mask", "text_encoders")
PYTHON_ONLY = ("generator",)  # of ALIASES: objects, not text
PARSED = {name for name, setting in SETTINGS.items() if setting.parser is not None}
WORDS: dict[str, str] = {word: name for word, name in ALIASES.items() if name in PARSED and word not in PYTHON_ONLY}
WORDS |= {name: name for name in PARSED} | FILE_WORDS


def find_word(word: str) -> str | None:
    """The word of WORDS or REFUSED that is meant, or None: --cfg-scale, "CFG scale" and cfg_scale are one."""
    if word in WORDS:
        return word
    plain = re.sub(r"[\s-]+", "_", word.strip())
    return next((w for w in (word, plain, plain.lower()) if w in WORDS or w in REFUSED), None)


@functools.lru_cache(maxsize=1024)  # the same mistake often stands in every line
def suggest_word(word: str, prefix: str = "") -> str:
    """`did you mean '…'?`, with `prefix` in front of the word, or "" where nothing is near."""
    hint = nearest(prefix + word, [prefix + name for name in (*WORDS, *REFUSED)])
    return hint if hint.startswith("did you mean") else ""


def parse_settings(pairs: Iterable[tuple[str, Any]], folder: Path) -> dict[str, Any]:
    """The settings of a line under our names, each checked; None is "not given". Paths are looked up from `folder`.

    Raises ConfigError with the word as `.where`: unknown (with the nearest), of a wrong type, out of range, given twice
    or not supported.
    """
    settings: dict[str, Any] = {}
    words: dict[str, str] = {}  # setting -> the word that gave it
    for given, value in pairs:
        word = find_word(given)
        if word is None:
            hint = suggest_word(given[:80]) or "begin its name with # to have it ignored"
            raise ConfigError(f"unknown setting {given!r:.80}", where=given[:80], hint=hint)
        if value is None:
            continue
        if word in REFUSED:
            _refuse(*REFUSED[word], value, given)
            continue
        name = WORDS[word]
        try:
            value = SETTINGS[name].parser(value, given, folder)
        except ConfigError as error:  # the shared checks name our word, the line has its own
            raise ConfigError(error.what, where=given, hint=error.hint) from None
        if name in UNSUPPORTED:
            _refuse(*UNSUPPORTED[name], value, given)
            continue
        targets = SETTINGS[name].sets
        for target, item in zip(targets, value) if targets else ((name, value),):
            if target == "spacing" and item is None:  # "Automatic", or a label without one
                continue
            if target in ADDED:
                item = settings.get(target, ()) + item
            elif target in settings and settings[target] != item:
                what = f"{words[target]} and {given} are the same setting, and both are given"
                raise ConfigError(what, where=given)
            settings[target], words[target] = item, given
    return _consistent(settings)


def with_own_controls(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a line and of its run, where kinds of `control` without a ControlNet are the model's own."""
    kinds = settings.get("control")
    found = {name: value for name, value in settings.items() if name != "control"}
    return found if kinds is None or found.get("controlnet") is not None else {**found, "controlnet": kinds}


def _refuse(neutral: tuple, sentence: str, value: Any, word: str) -> None:
    """Raise ConfigError unless `value` is one that changes nothing."""
    switches = {"true": True, "": True, "false": False}
    plain = switches.get(value.strip().lower(), values.number(value)) if isinstance(value, str) else value
    same_kind = (item for item in neutral if isinstance(item, bool) == isinstance(plain, bool) or item is ANY)
    if not any(item is ANY or item == plain for item in same_kind):
        raise ConfigError(sentence, where=word, hint="leave it out")


def _consistent(settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` without what changes nothing, its numbers of images made one, and in agreement with its seeds."""
    batch = settings.pop("batch_size", None)
    if batch is not None:
        settings["num_images"] = check_int(settings.get("num_images", 1) * batch, "batch_size", 1, MAX_IMAGES)
    if settings.get("variation_strength") == 0:  # A1111 writes a drawn subseed beside it
        del settings["variation_strength"]
        settings.pop("variation_seed", None)
    if settings.get("variation_seed") == -1:
        del settings["variation_seed"]
    seeds, images = settings.get("seed"), settings.get("num_images")
    if isinstance(seeds, tuple) and images not in (None, len(seeds)):
        raise ConfigError(f"{len(seeds)} seeds for {images} images", where="seed")
    if "mask_image" in settings and "image" not in settings:
        raise ConfigError("a mask needs an image", where="mask_image")
    return settings
