"""Image prompts: images that an IP-Adapter shows to a model beside the text. Only requests with such images come here.

Shapes:  N images of one adapter   T tokens of an image   D text width   H, W image size
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.ip_adapter import find_ip_adapter, find_vision
from ldm.config import require
from ldm.errors import ConfigError, nearest
from ldm.files import sha256
from ldm.nn.ip_adapter import IPAdapter, Prompted, Scale
from ldm.nn.offload import moved
from ldm.nn.unet_config import UNetConfig
from ldm.nn.vision import VisionTower
from ldm.pipeline.control import listed
from ldm.pipeline.sources import HALF, open_image, open_mask

if TYPE_CHECKING:
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import ImageRequest, Run, Settings

IMAGE, SCALE, MASK = "ip_adapter_image", "ip_adapter_scale", "ip_adapter_mask"
KEPT = 256  # images whose tokens stay in memory
Spec = float | tuple[float, ...] | Mapping[str, Any]  # an adapter's scale, as diffusers has it


@dataclass(frozen=True)
class ImageFile:
    """An image or a mask as it was given."""

    image: Image.Image  # RGB
    name: str  # its path, or "given"
    sha256: str  # of its pixels


@dataclass(frozen=True)
class Shown:
    """What one adapter shows for one image that is drawn."""

    images: tuple[ImageFile, ...]
    masks: tuple[ImageFile, ...] = ()  # none, or one for each


@dataclass(frozen=True)
class ImagePrompts:
    """Those of a call."""

    scales: tuple[Spec, ...]  # one for each adapter
    each: tuple[tuple[Shown, ...], ...]  # for each image that is drawn, one for each adapter


def check_image_prompts(
    given: Mapping[str, Any], prompts: int, num_images: int, info: ModelInfo | None = None
) -> ImagePrompts | None:
    """From generate's ip_adapter_image and the words beside it, and Pipeline's ip_adapter; None without any.

    Opens the files. Raises ConfigError where adapters, images and masks are not as many, for scales that cannot be (of
    the levels of a model where `info` is given), and for files that are no images.
    """
    adapters = len(listed(given.get("ip_adapter")))
    if given.get(IMAGE) is None:
        for word in (SCALE, MASK):
            require(given.get(word) is None, f"needs an {IMAGE}", word)
        require(not adapters, "an IP-Adapter needs an image to show", IMAGE)
        return None
    require(adapters > 0, "needs an IP-Adapter: Pipeline(…, ip_adapter=…), --ip-adapter FILE", IMAGE)
    read = functools.cache(lambda key, where: _opened(known[key], where))  # an image that is given twice is one object
    known: dict[int, Any] = {}

    def files(values: Sequence[Any], where: str) -> tuple[ImageFile, ...]:
        known.update({id(value): value for value in values})
        return tuple(read(id(value), where) for value in values)

    images, masks = (_rows(given.get(word), adapters, prompts, word) for word in (IMAGE, MASK))
    rows = []
    for row, masked in zip(images, masks):
        for shown, mask in zip(row, masked):
            require(len(mask) in (0, len(shown)), f"{len(mask)} masks for {len(shown)} images", MASK)
        rows.append(tuple(Shown(files(shown, IMAGE), files(mask, MASK)) for shown, mask in zip(row, masked)))
    scales = _scales(given.get(SCALE), rows, info)
    return ImagePrompts(scales, tuple(row for row in rows for _ in range(num_images)))


def _rows(value: Any, adapters: int, prompts: int, where: str) -> list[list[tuple[Any, ...]]]:
    """For each prompt the images of each adapter."""
    if value is None:
        return [[()] * adapters] * prompts
    if not isinstance(value, (list, tuple)):
        require(adapters == 1, f"one for {adapters} IP-Adapters", where)
        return [[(value,)]] * prompts
    if adapters > 1 or len(value) == 1:  # as diffusers has it
        require(len(value) == adapters, f"{len(value)} for {adapters} IP-Adapters", where)
        return [[listed(images) for images in value]] * prompts
    if prompts == 1 and len(value) > 1:
        return [[tuple(value)]]
    require(len(value) == prompts, f"{len(value)} of them for {prompts} prompts", where)
    return [[listed(images)] for images in value]


def _opened(value: Any, where: str) -> ImageFile:
    return ImageFile(*(open_mask if where == MASK else open_image)(value, where))


def _scales(value: Any, rows: Sequence[tuple[Shown, ...]], info: ModelInfo | None) -> tuple[Spec, ...]:
    adapters = len(rows[0])
    values = tuple(value) if isinstance(value, (list, tuple)) else (1.0 if value is None else value,) * adapters
    require(len(values) == adapters, f"{len(values)} of them for {adapters} IP-Adapters", SCALE)
    found: list[Spec] = []
    for i, one in enumerate(values):
        if isinstance(one, (list, tuple)):
            counts = {len(row[i].masks) for row in rows}
            require(counts == {len(one)}, f"{len(one)} numbers for an adapter need as many masks", SCALE)
            found.append(tuple(_number(number) for number in one))
        else:
            found.append(one if isinstance(one, Mapping) else _number(one))
        if info is not None and isinstance(info.unet, UNetConfig):  # the adapters are refused for others
            level_scales(found[-1], info.unet)
    return tuple(found)


def _number(value: Any) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(good, f"expected a finite number, got {value!r:.80}", SCALE)
    return float(value)


def level_scales(spec: Spec, config: UNetConfig) -> dict[str, Scale]:
    """Beginnings of a U-Net's layer names -> scales.

    A mapping is diffusers': {"down": {"block_2": [0, 1]}, "mid": 0.5, "up": 1}, a number for a side, a block or each
    of its transformers; what is not named is 0. Raises ConfigError.
    """
    if not isinstance(spec, Mapping):
        return {"": spec}
    last, layers = len(config.transformer_layers) - 1, config.layers_per_block
    blocks: dict[str, dict[str, tuple[str, int]]] = {"down": {}, "up": {}}
    for level, depth in enumerate(config.transformer_layers):
        if depth:
            blocks["down"][f"block_{level}"] = f"down_blocks.{level}", layers
            blocks["up"][f"block_{last - level}"] = f"up_blocks.{last - level}", layers + 1
    _check_words(spec, ("down", "mid", "up"))
    found: dict[str, Scale] = {"mid_block": _number(spec.get("mid", 0.0))}
    for side, known in blocks.items():
        of_side = spec.get(side, 0.0)
        of_side = of_side if isinstance(of_side, Mapping) else dict.fromkeys(known, of_side)
        _check_words(of_side, known)
        for block, (name, count) in known.items():
            value = of_side.get(block, 0.0)
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            values = values * count if len(values) == 1 else values
            require(len(values) == count, f"{side} {block} has {count} transformers, not {len(values)}", SCALE)
            found |= {f"{name}.attentions.{i}.": _number(one) for i, one in enumerate(values)}
    return found


def _check_words(given: Mapping[str, Any], known: Any) -> None:
    for word in given:
        if word not in known:
            what = f"this model has no attention in {word!r:.80}"
            raise ConfigError(what, where=SCALE, hint=nearest(str(word), list(known)))


@dataclass
class IPAdapters:
    """The adapters of an engine and their tower: found and fitted to its model at once, loaded when they are needed."""

    given: tuple[Any, ...]
    encoder: Any  # the tower as it was given
    info: ModelInfo
    _loaded: dict[torch.dtype, tuple[VisionTower, list[IPAdapter]]] = field(default_factory=dict, init=False)
    _tokens: dict[tuple, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.files = [find_ip_adapter(name, self.info) for name in self.given]
        self.vision = find_vision(self.encoder, self.files, self.info.path)

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """Of each file its absolute path and sha256, and those of the tower."""
        adapters = [{"path": str(file.path.resolve()), "hash": sha256(file.path)} for file in self.files]
        place = str(self.vision.path.resolve() if self.encoder is None or Path(self.encoder).exists() else self.encoder)
        return {"ip_adapter": adapters, "image_encoder": {"path": place, "hash": self.vision.hash}}

    def prompted(
        self, place: Placement, settings: Settings, requests: Sequence[ImageRequest], run: Run, dtype: torch.dtype
    ) -> list[Prompted]:
        """The adapters at work on a batch, on the device. Raises ModelError as loading does."""
        scales = settings.shown or ()
        tower, nets = self.load(place, dtype)
        self._encode(place, dtype, requests, tower, nets)
        found = []
        for i, (net, scale) in enumerate(zip(nets, scales, strict=True)):
            shown = [request.shown[i] for request in requests]
            tokens = {  # one tensor for what is the same
                hashes: torch.cat([self._tokens[dtype, i, digest] for digest in hashes])
                for hashes in {tuple(image.sha256 for image in one.images) for one in shown}
            }
            rows = [tokens[tuple(image.sha256 for image in one.images)] for one in shown]
            empty = self._tokens[dtype, i, None].expand(len(shown[0].images), -1, -1)
            masks = [_mask(one.masks, run).to(place.device) for one in shown] if shown[0].masks else None
            lent = moved(net, place.device) if place.offload else net
            found.append(Prompted(lent, self._by_layer(scale), rows, [empty] * len(rows), masks))
        return found

    def load(self, place: Placement, dtype: torch.dtype) -> tuple[VisionTower, list[IPAdapter]]:
        """Where weights are kept, in this dtype, read once. Raises ModelError."""
        if dtype not in self._loaded:
            nets = [file.load(place.home, dtype) for file in self.files]
            self._loaded[dtype] = self.vision.load(place.home, dtype), nets
        return self._loaded[dtype]

    def unload(self) -> None:
        """Forget the weights."""
        self._loaded.clear()

    def _encode(
        self,
        place: Placement,
        dtype: torch.dtype,
        requests: Sequence[ImageRequest],
        tower: VisionTower,
        nets: Sequence[IPAdapter],
    ) -> None:
        """The tokens of each image that is new, of each alone, so that its bits do not depend on the others."""
        images: dict[tuple[int, str | None], Image.Image | None] = {
            (i, image.sha256): image.image for r in requests for i, one in enumerate(r.shown) for image in one.images
        }
        images |= {(i, None): None for i in range(len(nets))}
        new = {key: image for key, image in images.items() if (dtype, *key) not in self._tokens}
        if len(self._tokens) + len(new) > KEPT:
            self._tokens.clear()
            new = images
        if not new:
            return
        with place.on(tower) as seeing, torch.no_grad():
            for (i, digest), image in new.items():
                lent = moved(nets[i].image_proj, place.device) if place.offload else nets[i].image_proj
                self._tokens[dtype, i, digest] = lent(seeing(image, nets[i].config.pooled))

    def _by_layer(self, spec: Spec) -> Mapping[str, Scale]:
        assert isinstance(self.info.unet, UNetConfig)  # as the adapters have checked
        return level_scales(spec, self.info.unet)


def _mask(masks: Sequence[ImageFile], run: Run) -> Tensor:
    """(N, H, W) in the size that is drawn: 1 where a mask is lighter than grey, else 0."""
    size = (run.width, run.height)
    grey = [one.image.convert("L") for one in masks]
    fitted = [one if one.size == size else one.resize(size, Image.Resampling.LANCZOS) for one in grey]
    return torch.from_numpy(np.stack([np.asarray(one) >= HALF for one in fitted])).float()
