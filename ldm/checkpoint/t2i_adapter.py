"""T2I-Adapters on disk: what the settings, or the names and shapes of a single file, say of one.

A single file has TencentARC's names, as A1111 and ComfyUI have them, or diffusers'. It tells neither the kind of a full
adapter nor into how many pixels a cell goes: the first follows from the model, the second from the channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ldm.checkpoint.describe import ModelInfo
from ldm.errors import ModelError
from ldm.nn.t2i_adapter import T2IAdapterConfig, places_of
from ldm.nn.unet_config import UNetConfig

PREFIX = "adapter."
BODY = re.compile(r"body\.(\d+)\.")
MARKS = ("body.0.block1.weight", "body.0.body.0.block1.weight", "body.0.resnets.0.block1.weight")


def is_t2i_adapter(keys: Mapping[str, object]) -> bool:
    """Whether a single file's tensors are a T2I-Adapter's."""
    return any(mark in keys or f"{PREFIX}{mark}" in keys for mark in MARKS)


def t2i_names(shapes: Mapping[str, Sequence[int]], path: Path) -> dict[str, str]:
    """Tensor in a single file -> in the network. Raises ModelError where layers are missing."""
    plain = {key: key.removeprefix(PREFIX) for key in shapes}
    if any(".resnets." in key for key in shapes):
        return {key: PREFIX + name for key, name in plain.items()}
    if any(name.startswith("body.0.body.") for name in plain.values()):  # light
        return {key: PREFIX + re.sub(r"^(body\.\d+)\.body\.", r"\1.resnets.", name) for key, name in plain.items()}
    bodies = {int(found[1]) for name in plain.values() if (found := BODY.match(name))}
    starts = [int(name.split(".")[1]) for name in plain.values() if re.fullmatch(r"body\.\d+\.in_conv\.weight", name)]
    layers = min(starts, default=2)  # the second level is the first that is wider
    whole = layers and len(bodies) % layers == 0 and bodies == set(range(len(bodies)))
    if not whole or any(start % layers for start in starts):
        raise ModelError("holds no whole T2I-Adapter", where=path, hint="get the file again")

    def renamed(found: re.Match[str]) -> str:
        level, layer = divmod(int(found[1]), layers)
        return f"body.{level}." if found[2] == "in_conv." else f"body.{level}.resnets.{layer}."

    pattern = re.compile(r"^body\.(\d+)\.(?=(in_conv\.)?)")
    return {key: PREFIX + pattern.sub(renamed, name) for key, name in plain.items()}


def t2i_config(shapes: Mapping[str, Sequence[int]], info: ModelInfo, path: Path) -> T2IAdapterConfig:
    """The settings that a single file's shapes, under the network's names, tell; of two kinds the one that fits.

    Raises ModelError where they are no adapter's.
    """
    body = f"{PREFIX}body."
    levels = len({key.split(".")[2] for key in shapes if key.startswith(body)})
    layers = len({key.split(".")[4] for key in shapes if key.startswith(f"{body}0.resnets.")})
    light = f"{body}0.out_conv.weight" in shapes
    first = f"{body}0.in_conv.weight" if light else f"{PREFIX}conv_in.weight"
    wide = "{}.out_conv.weight" if light else "{}.resnets.0.block1.weight"
    try:
        widths = tuple(shapes[body + wide.format(level)][0] for level in range(levels))
        inputs = shapes[first][1]
    except (KeyError, IndexError):
        raise ModelError("holds no whole T2I-Adapter", where=path, hint="get the file again") from None
    grey = math.isqrt(inputs) ** 2 == inputs  # 3 times a square is none
    factor = math.isqrt(inputs if grey else inputs // 3)
    kinds = ("light_adapter",) if light else ("full_adapter", "full_adapter_xl")
    widths = widths[:-1] if light else widths
    found = [T2IAdapterConfig(1 if grey else 3, widths, layers, factor, kind) for kind in kinds]
    return next((one for one in found if _fits(one, info)), found[0])


def _fits(config: T2IAdapterConfig, info: ModelInfo) -> bool:
    assert isinstance(info.unet, UNetConfig)  # as `check_t2i_base` is asked first
    wanted, mine = places_of(info.unet, info.factor), config.features
    return len(wanted) - 1 <= len(mine) and mine == wanted[: len(mine)]


def check_t2i_base(config: T2IAdapterConfig, info: ModelInfo, path: Path) -> None:
    """Raise ModelError where an adapter's features are not what the model's U-Net takes."""
    if _fits(config, info):
        return
    assert isinstance(info.unet, UNetConfig)
    both = (config.features, places_of(info.unet, info.factor))
    shown = [", ".join(f"{width} at 1/{scale}" for width, scale in one) for one in both]
    what = f"does not fit {info.name}: it gives features of {shown[0]}, and the U-Net takes {shown[1]}"
    raise ModelError(what, where=path, hint="choose a T2I-Adapter that was trained for this model's family")
