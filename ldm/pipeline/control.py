"""Control: images of edges, depth, … that steer what is drawn, each through a ControlNet of its own.

A control image is a condition as it is, or KIND:FILE, an image that one is made of (ldm.control), at the size that is
drawn. Only requests with control images come here.

Shapes:  B batch   H, W image size   R rows of the network, several conditions of B each
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldm.checkpoint.controlnet import hash_of_controlnet
from ldm.checkpoint.controls import find_control
from ldm.checkpoint.describe import ModelInfo
from ldm.config import require
from ldm.control import ALIASES, KINDS, condition_of
from ldm.errors import ConfigError
from ldm.nn.controlnet import ControlNet
from ldm.nn.offload import moved
from ldm.nn.t2i_adapter import T2IAdapter
from ldm.pipeline.checks import check_bool, check_guidance, check_int
from ldm.pipeline.sources import open_image

if TYPE_CHECKING:
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import Settings

SCALE, START, END = "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"
MODE = "control_mode"
Network = ControlNet | T2IAdapter


@dataclass(frozen=True)
class ControlSettings:
    """How ControlNets act, one number for each; the same for all images of a call."""

    scales: tuple[float, ...]  # how much of their outputs
    starts: tuple[float, ...]  # fractions of the steps
    ends: tuple[float, ...]
    guess_mode: bool = False  # they act on the answer with the prompt alone, and less at high resolutions
    modes: tuple[int | None, ...] = ()  # of a ControlNet Union: the kind of its condition

    def keywords(self) -> dict[str, Any]:
        """generate's, without those that change nothing."""
        found: dict[str, Any] = {SCALE: self.scales}
        if any(self.starts):
            found[START] = self.starts
        if set(self.ends) != {1.0}:
            found[END] = self.ends
        if self.modes:
            found[MODE] = self.modes
        return {**found, "guess_mode": True} if self.guess_mode else found

    def acting(self, step: int, steps: int) -> list[int]:
        """Which ControlNets act at a step, counted as diffusers does."""
        spans = zip(self.scales, self.starts, self.ends)
        return [
            i
            for i, (scale, start, end) in enumerate(spans)
            if scale and not (step / steps < start or (step + 1) / steps > end)
        ]


@dataclass(frozen=True)
class ControlImage:
    """What one ControlNet sees for one image."""

    image: Image.Image  # RGB
    kind: str | None  # what a condition is made of it by; None: it is one
    name: str  # as metadata has it: KIND:FILE, FILE, or "given"
    sha256: str  # of the image's pixels

    def condition(self, height: int, width: int) -> Image.Image:
        """In this size, RGB."""
        image = self.image
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        return image if self.kind is None else condition_of(self.kind, image)


@dataclass(frozen=True)
class Controls:
    """Those of a call."""

    settings: ControlSettings
    each: tuple[tuple[ControlImage, ...], ...]  # for each image, one for each ControlNet

    def size(self, side: int, factor: int, height: int | None, width: int | None) -> tuple[int, int]:
        """(height, width) where one or both are not given: the first image's proportions, side² pixels in all."""
        w, h = self.each[0][0].image.size
        if height is None and width is None:
            height = max(factor, round((side * side * h / w) ** 0.5 / factor) * factor)
        if height is None:
            assert width is not None
            height = max(factor, round(width * h / w / factor) * factor)
        return height, width or max(factor, round(height * w / h / factor) * factor)


def check_controls(given: Mapping[str, Any], prompts: int, num_images: int) -> Controls | None:
    """From generate's control_image and the words beside it, and Pipeline's controlnet; None without any.

    Opens the files. Raises ConfigError where ControlNets and control images are not as many, for numbers out of range,
    and for files that are no images.
    """
    nets, value = listed(given.get("controlnet")), given.get("control_image")
    if value is None:
        for word in (SCALE, START, END, MODE, "guess_mode"):
            require(given.get(word) in (None, False), f"{word} needs a control_image", word)
        require(not nets, "a ControlNet needs an image to look at", "control_image")
        return None
    require(len(nets) > 0, "needs a ControlNet: Pipeline(…, controlnet=…), --controlnet FOLDER", "control_image")
    rows, known = _rows(value, len(nets), prompts), {}
    for image in (image for row in rows for image in row):
        if id(image) not in known:
            known[id(image)] = _read(image)
    each = tuple(tuple(known[id(image)] for image in row) for row in rows for _ in range(num_images))
    return Controls(_settings(given, len(nets)), each)


def listed(value: Any) -> tuple[Any, ...]:
    """One ControlNet, IP-Adapter or image, or several, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _rows(value: Any, nets: int, prompts: int) -> list[list[Any]]:
    """For each prompt the images of its ControlNets; with one ControlNet a list has one image for each prompt."""
    if not isinstance(value, (list, tuple)):
        require(nets == 1, f"one image for {nets} ControlNets", "control_image")
        return [[value]] * prompts
    if nets == 1 and len(value) == 1:
        return [list(value)] * prompts
    if nets == 1:
        require(len(value) == prompts, f"{len(value)} of them for {prompts} prompts", "control_image")
        return [[image] for image in value]
    if all(isinstance(row, (list, tuple)) for row in value):  # of each prompt
        require(len(value) == prompts, f"{len(value)} lists for {prompts} prompts", "control_image")
        wrong = next((len(row) for row in value if len(row) != nets), nets)
        require(wrong == nets, f"{wrong} images for {nets} ControlNets", "control_image")
        return [list(row) for row in value]
    require(len(value) == nets, f"{len(value)} images for {nets} ControlNets", "control_image")
    return [list(value)] * prompts


def _read(value: Any) -> ControlImage:
    kind = None
    if isinstance(value, str):
        head, colon, tail = value.partition(":")
        if colon and (name := ALIASES.get(head, head)) in KINDS:
            kind, value = name, tail
        elif colon and head.isalpha() and len(head) > 1:
            hint = f"choose from: {', '.join(KINDS)}"
            raise ConfigError(f"{head!r:.80} is no kind of control that is made here", where="control_image", hint=hint)
    image, name, digest = open_image(value, "control_image")
    return ControlImage(image, kind, name if kind is None or name == "given" else f"{kind}:{name}", digest)


def _settings(given: Mapping[str, Any], nets: int) -> ControlSettings:
    scales = _numbers(given, SCALE, 1.0, nets)
    starts, ends = _numbers(given, START, 0.0, nets), _numbers(given, END, 1.0, nets)
    for start, end in zip(starts, ends):
        good = 0 <= start < end <= 1
        require(good, f"{start:g} to {end:g} is no part of the steps: 0 to 1, the end above the start", START)
    guess = given.get("guess_mode")
    guess = guess is not None and check_bool(guess, "guess_mode")
    return ControlSettings(scales, starts, ends, guess, _modes(given.get(MODE), nets))


def _modes(value: Any, nets: int) -> tuple[int | None, ...]:
    """One number for each network, None for one that has no kinds; () where none is given."""
    if value is None:
        return ()
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * nets
    require(len(values) == nets, f"{len(values)} numbers for {nets} ControlNets", MODE)
    return tuple(one if one is None else check_int(one, MODE, 0, 1000) for one in values)


def _numbers(given: Mapping[str, Any], where: str, default: float, nets: int) -> tuple[float, ...]:
    value = given.get(where)
    if value is None:
        return (default,) * nets
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * nets
    values = values * nets if len(values) == 1 else values
    require(len(values) == nets, f"{len(values)} numbers for {nets} ControlNets", where)
    return tuple(check_guidance(one, where) for one in values)


@dataclass
class ControlNets:
    """The ControlNets of an engine: found and fitted to its model at once, loaded when they are needed."""

    given: tuple[Any, ...]
    info: ModelInfo
    _loaded: dict[torch.dtype, list[Network]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.files = [find_control(_own(name, self.info), self.info) for name in self.given]

    @functools.cached_property
    def metadata(self) -> list[dict[str, str]]:
        """Of each its path as it was given, absolute where it is here, and its sha256."""
        names = [str(Path(name).resolve()) if Path(name).exists() else os.fspath(name) for name in self.given]
        return [
            {"path": name, "hash": hash_of_controlnet(file.path)} for name, file in zip(names, self.files, strict=True)
        ]

    def check(self, settings: Settings) -> None:
        """Raise ConfigError where a kind is missing, has no meaning, or a size cannot be."""
        assert settings.control is not None  # as images and networks are as many
        for file, mode in zip(self.files, settings.control.modes or (None,) * len(self.files)):
            kinds, cell = getattr(file, "kinds", 0), getattr(file, "cell", 1)
            named = f"{file.path.name} knows {kinds} kinds of condition: give one from 0 to {kinds - 1}"
            require(not kinds or (mode is not None and mode < kinds), named, MODE)
            require(bool(kinds) or mode is None, f"{file.path.name} is no ControlNet Union and has no kinds", MODE)
            for run in settings.runs:
                fits, size = run.height % cell == run.width % cell == 0, f"{run.width}x{run.height}"
                require(fits, f"{file.path.name} needs multiples of {cell}, not {size}", "width, height")

    def at_work(self, place: Placement, dtype: torch.dtype) -> list[Network]:
        """On the device, in this dtype. Raises ModelError as loading does."""
        if dtype not in self._loaded:
            self._loaded[dtype] = [file.load(place.home, dtype) for file in self.files]
            for net in self._loaded[dtype]:
                if isinstance(net, ControlNet):
                    net.set_attention(place.attention)
        nets = self._loaded[dtype]
        return [moved(net, place.device) for net in nets] if place.offload else nets


def _own(name: Any, info: ModelInfo) -> Any:
    """The folder of a control that the model itself comes with, for a kind; else the name as it is."""
    if not isinstance(name, str) or name not in KINDS or Path(name).exists():
        return name
    folder = None if info.path is None else info.path / "controlnets" / name
    if folder is None or not folder.is_dir():
        hint = "give a ControlNet that was trained for it: --controlnet FOLDER, or train one: ldm finetune --control"
        raise ConfigError(f"{info.name} has no control {name!r} of its own", where="controlnet", hint=hint)
    return folder
