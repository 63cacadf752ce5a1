"""LoRA files put onto a model: which layer each belongs to, whether it fits, and the model with all of them merged."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoint.default import default_folder
from ldm.checkpoint.folder import Layout, read_layout
from ldm.checkpoint.lora.names import PARTS, spellings
from ldm.checkpoint.lora.read import Entry, LoraFile, LoraHeader
from ldm.checkpoint.safety import read_header
from ldm.checkpoint.single import plan_of
from ldm.checkpoint.types import Model
from ldm.errors import ModelError
from ldm.nn.unet_config import UNetConfig

CROSS = ("attn2.to_k", "attn2.to_v")  # the layers that take the text's states


@dataclasses.dataclass(frozen=True)
class Target:
    """The layers of a model, as far as fitting a LoRA needs them."""

    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]  # part -> layer -> shape of its weight
    unet: UNetConfig


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where the layers of a LoRA file go in a model."""

    places: Mapping[str, tuple[str, str]]  # the file's name of a layer -> (part, layer)
    unapplied: tuple[str, ...]  # keys that have no place


def fit(header: LoraHeader, target: Target, allow_unapplied: bool = False) -> Fit:
    """Find the place of every layer. Raises ModelError in one line: no layer fits, some keys have no place (unless that
    is allowed), weights of another shape.
    """
    names = spellings(target.shapes, target.unet)
    places = {layer: names[layer] for layer in header.entries if layer in names}
    left = [key for layer, entry in header.entries.items() if layer not in places for key in entry.keys.values()]
    left += header.unknown
    first: dict[tuple[str, str], str] = {}
    for layer, (part, name) in sorted(places.items(), key=lambda place: not place[1][1].endswith(CROSS)):
        _check_shape(header, header.entries[layer], part, name, target.shapes[part][name])
    if not places:
        what = f"not one of its {len(header.entries)} layers is in this model ({', '.join(list(header.entries)[:3])})"
        raise ModelError(what, where=header.path, todo="it was made for another model")
    for layer, place in places.items():
        if first.setdefault(place, layer) != layer:
            raise ModelError(f"{first[place]} and {layer} are the same layer of this model", where=header.path)
    if left and not allow_unapplied:
        total = sum(len(entry.keys) for entry in header.entries.values()) + len(header.unknown)
        what = f"{len(left)} of {total} keys have no place in this model: {_first(left)}"
        raise ModelError(what, where=header.path, todo="allow_unapplied (--allow-unapplied) leaves them out")
    return Fit(places, tuple(left))


def _first(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def unapplied_line(header: LoraHeader, found: Fit) -> str:
    """What is said of the keys that were allowed to be left out."""
    return f"{header.path}: {len(found.unapplied)} keys are not applied: {_first(found.unapplied)}"


def _check_shape(header: LoraHeader, entry: Entry, part: str, name: str, shape: tuple[int, ...]) -> None:
    down, up = entry.shapes["down"], entry.shapes["up"]
    kernel = down[2:] == shape[2:] or math.prod(down[2:]) == math.prod(shape[2:]) == 1
    if up[0] == shape[0] and down[1] == shape[1] and kernel:
        return
    where, todo = header.path, "it was made for another model"
    if part == "unet" and name.endswith(CROSS) and down[1] != shape[1]:
        what = f"this LoRA is for cross_attention_dim {down[1]}, this model has {shape[1]}"
        raise ModelError(what, where=where, todo=todo)
    theirs = [up[0], *down[1:]]
    raise ModelError(
        f"its {part}.{name} is for weights of shape {theirs}, this model has {list(shape)}", where=where, todo=todo
    )


def target_at(model: Any, prediction_type: str | None = None) -> Target | None:
    """Of a model's folder or single file, or of a loaded model; None where weights would have to be fetched first."""

    if not isinstance(model, (str, os.PathLike)):
        return target_of(model)
    place = default_folder() if str(model) == "default" else Path(model).expanduser()
    if place.is_dir():
        return target_in(read_layout(place, skip=("vae",)))
    if not place.is_file():
        return None
    plan = plan_of(place, prediction_type, skip=("vae",))
    shapes = {part: _layers(plan.shapes(part).items()) for part in PARTS if part in plan.configs}
    return Target(shapes, UNetConfig.from_diffusers(plan.configs["unet"], place))


def target_in(layout: Layout) -> Target:
    """Of a model folder, from the headers of its weight files; no torch."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in (part for part in PARTS if part in layout.weights):
        tables = [read_header(path).tensors for path in layout.shards(part)]
        shapes[part] = _layers((name, tensor.shape) for table in tables for name, tensor in table.items())
    return Target(shapes, UNetConfig.from_diffusers(layout.configs["unet"], layout.folder / "unet"))


def _layers(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Linear layers and convolutions, by the names and shapes of their weights."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in tensors
        if name.endswith(".weight") and len(shape) in (2, 4) and not name.endswith("embedding.weight")
    }


def networks(model: Model) -> dict[str, Any]:
    """The networks that a LoRA can change, under the names of files."""
    return dict(zip(PARTS, (model.unet, *model.text.modules)))


def target_of(model: Model) -> Target:
    """Of a loaded model."""
    from ldm.nn.lora import layers_of

    shapes = {
        part: {name: tuple(layer.weight.shape) for name, layer in layers_of(module).items()}
        for part, module in networks(model).items()
    }
    return Target(shapes, model.unet.config)


def with_loras(model: Model, loras: Sequence[tuple[LoraFile, float]], allow_unapplied: bool = False) -> Model:
    """The model with every (file, weight) merged. `model` stays as it is and shares all weights that do not change.

    Weights may be negative; `info["lora"]` tells of each its path, name, weight and hash. Raises ModelError as `fit`.
    """
    from ldm.nn.lora import clone_shared_weights, merge

    target = target_of(model)
    updates: dict[str, dict[str, list]] = {part: {} for part in target.shapes}
    for lora, weight in loras:
        for layer, (part, name) in fit(lora.header, target, allow_unapplied).places.items():
            updates[part].setdefault(name, []).append((lora.layers[layer], weight))
    changed = {}
    for part, module in networks(model).items():
        if updates[part]:
            changed[id(module)] = copied = clone_shared_weights(module)
            merge(copied, updates[part])
    info = {**model.info, "lora": [*model.info.get("lora", ()), *(_told(lora, weight) for lora, weight in loras)]}
    unet = changed.get(id(model.unet), model.unet)
    text = _with_words(with_networks(model.text, changed), [word for lora, _ in loras for word in lora.header.words])
    return dataclasses.replace(model, unet=unet, text=text, info=info)


def _with_words(text: Any, words: Sequence[str]) -> Any:
    """The text encoder that knows these words too, where it is known which it was trained on."""
    if not words or getattr(text, "words", None) is None:
        return text
    new = copy.copy(text)
    new.words = text.words.union(words)
    return new


def _told(lora: LoraFile, weight: float) -> dict[str, Any]:
    name, path = lora.header.name, str(Path(lora.header.path).resolve())
    return {"name": name, "path": path, "weight": weight, "hash": lora.hash, "short_hash": lora.short_hash}


def with_networks(text: Any, changed: Mapping[int, Any]) -> Any:
    """The same text encoder (or pair of them), other networks in the place of those in `changed`, by id."""
    if not any(id(module) in changed for module in text.modules):
        return text
    new = copy.copy(text)
    for name, value in vars(text).items():
        if id(value) in changed:
            setattr(new, name, changed[id(value)])
        elif isinstance(getattr(value, "modules", None), tuple):  # an encoder within an encoder
            setattr(new, name, with_networks(value, changed))
    return new
