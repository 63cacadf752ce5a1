"""LoRA files applied to a model: which layer each update belongs to, whether it fits, and the merged model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.lora.names import spellings, stacked_spellings
from ldm.checkpoint.lora.read import Entry, LoraFile, LoraHeader
from ldm.checkpoint.lora.target import Target, networks, target_of
from ldm.checkpoint.types import Model
from ldm.errors import ModelError

if TYPE_CHECKING:
    from ldm.nn.lora import LowRank

Weight = float | tuple[float, float]  # of all, or (of text encoders, of the U-Net)
CROSS = ("attn2.to_k", "attn2.to_v")  # the layers that read the text's states


@dataclasses.dataclass(frozen=True)
class Match:
    """Which layer of a model each layer of a LoRA file belongs to."""

    layers: Mapping[str, tuple[str, str]]  # the file's name of a layer -> (part, layer)
    stacked: Mapping[str, tuple[str, ...]]  # of a layer that is several of a flow transformer -> their names
    unapplied: tuple[str, ...]  # keys that belong to no layer


def match_layers(header: LoraHeader, target: Target, allow_unapplied: bool = False) -> Match:
    """Find the model's layer for every layer of the file.

    Raises ModelError in one line: no layer matches, some keys match none (unless `allow_unapplied`), two layers of the
    file are the same layer of the model, weights have another shape.
    """
    names = spellings(target.shapes, target.unet)
    layers = {layer: names[layer] for layer in header.entries if layer in names}
    known = stacked_spellings(target.unet)
    stacked = {layer: known[layer] for layer in header.entries if layer in known and layer not in layers}
    missing = [entry for layer, entry in header.entries.items() if layer not in layers and layer not in stacked]
    unapplied = [key for entry in missing for key in entry.keys.values()]
    unapplied += header.unknown
    for layer, (part, name) in sorted(layers.items(), key=lambda item: not item[1][1].endswith(CROSS)):
        _check_shape(header, header.entries[layer], part, name, target.shapes[part][name])
    for layer, names_in in stacked.items():
        rows = [target.shapes["unet"][name] for name in names_in]
        whole = (sum(shape[0] for shape in rows), *rows[0][1:])
        _check_shape(header, header.entries[layer], "unet", names_in[0], whole)
    if not layers and not stacked:
        what = f"not one of its {len(header.entries)} layers is in this model ({', '.join(list(header.entries)[:3])})"
        raise ModelError(what, where=header.path, hint="it was made for another model")
    seen: dict[tuple[str, str], str] = {}
    pairs = [*layers.items(), *((layer, ("unet", name)) for layer, found in stacked.items() for name in found)]
    for layer, model_layer in pairs:
        if seen.setdefault(model_layer, layer) != layer:
            raise ModelError(f"{seen[model_layer]} and {layer} are the same layer of this model", where=header.path)
    if unapplied and not allow_unapplied:
        total = sum(len(entry.keys) for entry in header.entries.values()) + len(header.unknown)
        what = f"{len(unapplied)} of {total} keys match no layer of this model: {_shorten(unapplied)}"
        raise ModelError(what, where=header.path, hint="allow_unapplied (--allow-unapplied) leaves them out")
    return Match(layers, stacked, tuple(unapplied))


def _shorten(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def unapplied_line(header: LoraHeader, match: Match) -> str:
    """The warning about keys that were allowed to be left out."""
    return f"{header.path}: {len(match.unapplied)} keys are not applied: {_shorten(match.unapplied)}"


def _check_shape(header: LoraHeader, entry: Entry, part: str, name: str, shape: tuple[int, ...]) -> None:
    down, up = entry.shapes["down"], entry.shapes["up"]
    kernel = down[2:] == shape[2:] or math.prod(down[2:]) == math.prod(shape[2:]) == 1
    if up[0] == shape[0] and down[1] == shape[1] and kernel:
        return
    where, hint = header.path, "it was made for another model"
    if part == "unet" and name.endswith(CROSS) and down[1] != shape[1]:
        what = f"this LoRA is for cross_attention_dim {down[1]}, this model has {shape[1]}"
        raise ModelError(what, where=where, hint=hint)
    what = f"its {part}.{name} is for weights of shape {[up[0], *down[1:]]}, this model has {list(shape)}"
    raise ModelError(what, where=where, hint=hint)


def with_loras(
    model: Model, loras: Sequence[tuple[LoraFile, Weight]], allow_unapplied: bool = False, dora: str = "linear"
) -> Model:
    """The model with every (file, weight) merged. `model` does not change; the two share all weights that are equal.

    A weight is a number, or (that of text encoders, that of the U-Net). It may be negative; `dora` says how weights act
    on a DoRA (see ldm.nn.lora.merged). `info["lora"]` lists path, name, weights and hash of each. Raises as
    match_layers.
    """
    from ldm.nn.lora import clone_shared_weights, merge

    target = target_of(model)
    updates: dict[str, dict[str, list]] = {part: {} for part in target.shapes}
    for lora, weight in loras:
        found = match_layers(lora.header, target, allow_unapplied)
        for layer, (part, name) in found.layers.items():
            updates[part].setdefault(name, []).append((lora.layers[layer], _weights(weight)[part == "unet"]))
        for layer, several in found.stacked.items():
            rows = [target.shapes["unet"][name][0] for name in several]
            for name, update in zip(several, parted(lora.layers[layer], rows)):
                updates["unet"].setdefault(name, []).append((update, _weights(weight)[True]))
    changed = {}
    for part, module in networks(model).items():
        if updates[part]:
            changed[id(module)] = copied = clone_shared_weights(module)
            merge(copied, updates[part], dora)
    listed = [_info(lora, weight, dora) for lora, weight in loras]
    info = {**model.info, "lora": [*model.info.get("lora", ()), *listed]}
    unet = changed.get(id(model.unet), model.unet)
    text = _with_words(with_networks(model.text, changed), [word for lora, _ in loras for word in lora.header.words])
    return dataclasses.replace(model, unet=unet, text=text, info=info)


def parted(update: LowRank, rows: Sequence[int]) -> list[LowRank]:
    """One update for each of the layers with so many outputs that it is for."""
    magnitudes = [None] * len(rows) if update.magnitude is None else update.magnitude.split(list(rows))
    ups = update.up.split(list(rows))
    return [dataclasses.replace(update, up=up, magnitude=m) for up, m in zip(ups, magnitudes)]


def _with_words(text: Any, words: Sequence[str]) -> Any:
    """The text encoder with these words added to those it was trained on, where these are known."""
    if not words or getattr(text, "words", None) is None:
        return text
    new = copy.copy(text)
    new.words = text.words.union(words)
    return new


def _weights(weight: Weight) -> tuple[float, float]:
    return weight if isinstance(weight, tuple) else (weight, weight)


def _info(lora: LoraFile, weight: Weight, dora: str) -> dict[str, Any]:
    name, path, (text, unet) = lora.header.name, str(Path(lora.header.path).resolve()), _weights(weight)
    found = {"name": name, "path": path, "weight": unet, "hash": lora.hash, "short_hash": lora.short_hash}
    found |= {"text_weight": text} if text != unet else {}
    return found | ({"dora_scaling": dora} if lora.header.dora and dora != "linear" else {})


def with_networks(text: Any, changed: Mapping[int, Any]) -> Any:
    """The same text encoder (or pair of encoders) with the networks in `changed` (id -> network) replaced."""
    if not any(id(module) in changed for module in text.modules):
        return text
    new = copy.copy(text)
    for name, value in vars(text).items():
        if id(value) in changed:
            setattr(new, name, changed[id(value)])
        elif isinstance(getattr(value, "modules", None), tuple):  # an encoder within an encoder
            setattr(new, name, with_networks(value, changed))
    return new
