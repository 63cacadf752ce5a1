"""Control: images of edges, depth, … that steer what is drawn, each through a ControlNet of its own.

A ControlNet Union may see several, of different kinds. A control image is a condition as it is, or KIND:FILE, an image
that one is made of (ldm.control), at the size that is drawn. Only requests with control images come here.

Shapes:  B batch   H, W image size   R rows of the network, several conditions of B each
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
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
from ldm.pipeline.sources import BLACK, WHITE, open_image

if TYPE_CHECKING:
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import Settings

SCALE, START, END = "controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end"
MODE = "control_mode"
Network = ControlNet | T2IAdapter
# The kinds of xinsir's ControlNet Unions by their numbers on the card, of six and of eight (promax), that are made here
UNION_MODES = {"soft-edges": 2, "edges": 3, "lineart": 3, "segmentation": 5, "tile": 6, "blur": 6}
UNIONS = (6, 8)


@dataclass(frozen=True)
class ControlSettings:
    """How ControlNets act, one number for each control image; the same for all images of a call."""

    scales: tuple[float, ...]  # how much of their outputs
    starts: tuple[float, ...]  # fractions of the steps
    ends: tuple[float, ...]
    guess_mode: bool = False  # they act on the answer with the prompt alone, and less at high resolutions
    modes: tuple[int | None, ...] = ()  # of a ControlNet Union: the kind of its condition
    counts: tuple[int, ...] = ()  # control images of each network; (): one

    def seen(self) -> list[list[int]]:
        """Which control images each network sees, by their numbers."""
        ends = list(itertools.accumulate(self.counts or (1,) * len(self.scales)))
        return [list(range(start, end)) for start, end in zip([0, *ends], ends)]

    def modes_of(self, images: Sequence[int]) -> list[int]:
        """The kinds of some control images; [] where their network has none."""
        return [mode for i in images for mode in (self.modes[i : i + 1]) if mode is not None]

    def keywords(self) -> dict[str, Any]:
        """generate's, without those that change nothing."""
        found: dict[str, Any] = {SCALE: self.scales}
        if any(self.starts):
            found[START] = self.starts
        if set(self.ends) != {1.0}:
            found[END] = self.ends
        if self.modes:
            each = tuple(
                tuple(self.modes[i] for i in one) if len(one) > 1 else self.modes[one[0]] for one in self.seen()
            )
            found[MODE] = self.modes if len(self.counts) < 2 else each
        return {**found, "guess_mode": True} if self.guess_mode else found

    def acting(self, step: int, steps: int) -> list[int]:
        """Which control images act at a step, counted as diffusers does."""
        spans = zip(self.scales, self.starts, self.ends)
        return [
            i
            for i, (scale, start, end) in enumerate(spans)
            if scale and not (step / steps < start or (step + 1) / steps > end)
        ]


@dataclass(frozen=True)
class ControlImage:
    """What a ControlNet sees for one image, or a ControlNet Union of one kind."""

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
    each: tuple[tuple[ControlImage, ...], ...]  # for each image, those of all ControlNets in their order

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
    modes, counts = _modes(given.get(MODE), len(nets))
    rows, known = _rows(value, counts, prompts), {}
    for image in (image for row in rows for image in row):
        if id(image) not in known:
            known[id(image)] = _read(image)
    each = tuple(tuple(known[id(image)] for image in row) for row in rows for _ in range(num_images))
    return Controls(_settings(given, modes, counts), each)


def listed(value: Any) -> tuple[Any, ...]:
    """One ControlNet, IP-Adapter or image, or several, as a tuple."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _rows(value: Any, counts: Sequence[int], prompts: int) -> list[list[Any]]:
    """For each prompt the images of all ControlNets, of which each sees `counts`.

    With one ControlNet that sees one image a list has one for each prompt.
    """
    nets, count = len(counts), sum(counts)
    seeing = f"{nets} ControlNets" if count == nets else f"{count} kinds of condition"
    if not isinstance(value, (list, tuple)):
        require(count == 1, f"one image for {seeing}", "control_image")
        return [[value]] * prompts
    if count == 1 and len(value) == 1:
        return [list(value)] * prompts
    if count == 1:
        require(len(value) == prompts, f"{len(value)} of them for {prompts} prompts", "control_image")
        return [[image] for image in value]
    are_lists = [isinstance(row, (list, tuple)) for row in value]
    lengths = [len(row) if is_list else 1 for row, is_list in zip(value, are_lists)]
    if count > nets > 1 and lengths == list(counts):  # of each ControlNet a list, or one image
        value = [image for row, is_list in zip(value, are_lists) for image in (row if is_list else [row])]
    elif all(are_lists):  # of each prompt
        require(len(value) == prompts, f"{len(value)} lists for {prompts} prompts", "control_image")
        wrong = next((len(row) for row in value if len(row) != count), count)
        require(wrong == count, f"{_images(wrong)} for {seeing}", "control_image")
        return [list(row) for row in value]
    require(len(value) == count, f"{_images(len(value))} for {seeing}", "control_image")
    return [list(value)] * prompts


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def _read(value: Any) -> ControlImage:
    kind = None
    if isinstance(value, str):
        head, colon, tail = value.partition(":")
        if colon and (name := ALIASES.get(head, head)) in KINDS:
            kind, value = name, tail
        elif colon and head.isalpha() and len(head) > 1:
            hint = f"choose from: {', '.join(KINDS)}; make depth, normals and pose by ldm preprocess first"
            raise ConfigError(f"{head!r:.80} is no kind of control that is made here", where="control_image", hint=hint)
    # conditions are light on black; what one is made of is drawn on white, as photos and drawings are
    image, name, digest = open_image(value, "control_image", BLACK if kind is None else WHITE)
    return ControlImage(image, kind, name if kind is None or name == "given" else f"{kind}:{name}", digest)


def control_warnings(each: Iterable[Iterable[ControlImage]]) -> list[str]:
    """One line for each condition that shows nothing, of those of several images."""
    images = {id(one): one for images in each for one in images if one.kind is None}.values()
    names = dict.fromkeys(one.name for one in images if one.image.getcolors(1) is not None)
    return [f"the control image ({name}) is of one colour: there is nothing to follow" for name in names]


def _settings(given: Mapping[str, Any], modes: tuple[int | None, ...], counts: tuple[int, ...]) -> ControlSettings:
    count = sum(counts)
    scales = _numbers(given, SCALE, 1.0, count)
    starts, ends = _numbers(given, START, 0.0, count), _numbers(given, END, 1.0, count)
    for start, end in zip(starts, ends):
        good = 0 <= start < end <= 1
        require(good, f"{start:g} to {end:g} is no part of the steps: 0 to 1, the end above the start", START)
    guess = given.get("guess_mode")
    guess = guess is not None and check_bool(guess, "guess_mode")
    return ControlSettings(scales, starts, ends, guess, modes, counts if max(counts) > 1 else ())


def _modes(value: Any, nets: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """(a number for each control image, None where its network has no kinds, or () where none is given; how many
    control images each network sees)."""
    if value is None:
        return (), (1,) * nets
    values = list(value) if isinstance(value, (list, tuple)) else [value] * nets
    if nets == 1 and not any(isinstance(one, (list, tuple)) for one in values):
        values = [values]  # of the one network
    require(len(values) == nets, f"{len(values)} numbers for {nets} ControlNets", MODE)
    each = [list(one) if isinstance(one, (list, tuple)) else [one] for one in values]
    require(all(each), "the list is empty", MODE)
    modes = tuple(one if one is None else check_int(one, MODE, 0, 1000) for row in each for one in row)
    return modes, tuple(map(len, each))


def _numbers(given: Mapping[str, Any], where: str, default: float, count: int) -> tuple[float, ...]:
    value = given.get(where)
    if value is None:
        return (default,) * count
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * count
    values = values * count if len(values) == 1 else values
    require(len(values) == count, f"{len(values)} numbers for {count} control images", where)
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

    def fitted(self, info: ModelInfo) -> ModelInfo:
        """`info` with the sizes that a T2I-Adapter can have."""
        return dataclasses.replace(info, cell=math.lcm(*(getattr(file, "cell", 1) for file in self.files)))

    def with_modes(self, given: Mapping[str, Any], prompts: int = 1) -> dict[str, Any]:
        """generate's keywords with the kinds of ControlNet Unions, where these are not given and KIND:FILE tells them.

        Raises ConfigError where images and ControlNets are not as many.
        """
        value = given.get("control_image")
        if given.get(MODE) is not None or value is None or not any(_kinds(file) in UNIONS for file in self.files):
            return dict(given)
        together = isinstance(value, (list, tuple)) and prompts == 1  # a list for each network, or all for the one
        if len(self.files) == 1 and together:
            each = [list(value)]
        elif together and len(value) == len(self.files):
            each = [list(one) if isinstance(one, (list, tuple)) else [one] for one in value]
        else:
            each = [[*column] for column in zip(*_rows(value, (1,) * len(self.files), prompts))]
            each = [column[:1] if len(set(map(_mode, column))) == 1 else [None] for column in each]
        modes = [[_mode(image) if _kinds(file) else None for image in one] for file, one in zip(self.files, each)]
        return {**given, MODE: modes[0] if len(modes) == 1 else modes}

    def check(self, settings: Settings) -> None:
        """Raise ConfigError where a kind is missing or has no meaning, and for several images of one kind."""
        assert settings.control is not None  # as images and networks are as many
        for file, images in zip(self.files, settings.control.seen(), strict=True):
            modes, kinds = settings.control.modes_of(images), _kinds(file)
            known = len(modes) == len(images) and all(mode < kinds for mode in modes)
            named = f"{file.path.name} knows {kinds} kinds of condition: give one from 0 to {kinds - 1}"
            require(not kinds or known, f"{named} for each of its images" if len(images) > 1 else named, MODE)
            require(bool(kinds) or not modes, f"{file.path.name} is no ControlNet Union and has no kinds", MODE)
            one = f"{len(images)} images for {file.path.name}, which is no ControlNet Union"
            require(bool(kinds) or len(images) == 1, one, "control_image")

    def load(self, place: Placement, dtype: torch.dtype) -> list[Network]:
        """Where weights are kept, in this dtype, read once. Raises ModelError."""
        if dtype not in self._loaded:
            self._loaded[dtype] = [file.load(place.home, dtype) for file in self.files]
            for net in self._loaded[dtype]:
                if isinstance(net, ControlNet):
                    net.set_attention(place.attention)
        return self._loaded[dtype]

    def unload(self) -> None:
        """Forget the weights."""
        self._loaded.clear()

    def at_work(self, place: Placement, dtype: torch.dtype) -> list[Network]:
        """On the device, in this dtype. Raises ModelError as loading does."""
        nets = self.load(place, dtype)
        return [moved(net, place.device) for net in nets] if place.offload else nets


def _kinds(file: Any) -> int:
    """Of a ControlNet Union; 0 for other networks."""
    return getattr(file, "kinds", 0)


def _mode(image: Any) -> int | None:
    """The kind that KIND:FILE tells a ControlNet Union; None where nothing does."""
    kind, colon, _ = image.partition(":") if isinstance(image, str) else ("", "", "")
    return UNION_MODES.get(ALIASES.get(kind, kind)) if colon else None


def _own(name: Any, info: ModelInfo) -> Any:
    """The folder of a control that the model itself comes with, for a kind; else the name as it is."""
    if not isinstance(name, str) or name not in KINDS or Path(name).exists():
        return name
    folder = None if info.path is None else info.path / "controlnets" / name
    if folder is None or not folder.is_dir():
        hint = "give a ControlNet that was trained for it: --controlnet FOLDER, or train one: ldm finetune --control"
        raise ConfigError(f"{info.name} has no control {name!r} of its own", where="controlnet", hint=hint)
    return folder
