"""What `controlnet` may name: a ControlNet, a ControlNet Union or a T2I-Adapter, told by its settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoint.controlnet import STEM, check_base, find_controlnet, place_of
from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.network_files import CONFIG, read_checked, reading_settings, tensor_files, tensors_on_meta
from ldm.checkpoint.safety import read_json
from ldm.errors import ModelError
from ldm.nn.batch_invariant import layout
from ldm.nn.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from ldm.nn.t2i_adapter import T2IAdapter, config_of, places_of
from ldm.nn.unet_config import UNetConfig
from ldm.nn.weights import check_keys, load_weights, on_meta


@dataclass(frozen=True)
class ControlFile:
    """A network of diffusers' folder that fits a model."""

    path: Path
    build: Callable[[], Any]
    files: tuple[Path, ...]
    kinds: int = 0  # of a ControlNet Union
    cell: int = 1  # pixels that have to divide height and width

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """In eval mode, without gradients. Raises ModelError for weights that are damaged or not finite in `dtype`."""
        state = read_checked(self.path, self.files, dtype, device)
        net: nn.Module = load_weights(on_meta(self.build), state, self.path).requires_grad_(False)
        return net.to(memory_format=layout(device, dtype))


def find_control(name: str | os.PathLike, info: ModelInfo) -> Any:
    """The network of a folder, a file or a hub id, checked to fit a model. Raises ModelError; reads no weight."""
    path = place_of(name)
    settings = read_json(path / CONFIG) if path.is_dir() else {}
    if settings.get("_class_name") == "T2IAdapter":
        return _found(path, lambda: _t2i_adapter(settings, info, path))
    if "num_control_type" in settings or settings.get("_class_name") == "ControlNetUnionModel":
        return _found(path, lambda: _union(settings, info, path))
    return find_controlnet(name, info)


def _found(path: Path, read: Callable[[], ControlFile]) -> ControlFile:
    with reading_settings(path):
        found = read()
        network = on_meta(found.build)
    check_keys(network, tensors_on_meta(found.files), path)
    return found


def _t2i_adapter(settings: Mapping[str, Any], info: ModelInfo, path: Path) -> ControlFile:
    if not isinstance(info.unet, UNetConfig):
        raise ModelError(f"T2I-Adapters steer U-Nets, and {info.name} has none", where=path)
    config = config_of(settings)
    wanted, mine = places_of(info.unet, info.factor), config.features
    if len(mine) < len(wanted) - 1 or mine != wanted[: len(mine)]:
        shown = [", ".join(f"{width} at 1/{scale}" for width, scale in one) for one in (mine, wanted)]
        what = f"does not fit {info.name}: it gives features of {shown[0]}, and the U-Net takes {shown[1]}"
        raise ModelError(what, where=path, hint="choose a T2I-Adapter that was trained for this model's family")
    return ControlFile(path, lambda: T2IAdapter(config), tensor_files(path, STEM), cell=config.downscale_factor)


def _union(settings: Mapping[str, Any], info: ModelInfo, path: Path) -> ControlFile:
    if not isinstance(info.unet, UNetConfig):
        raise ModelError(f"ControlNets steer U-Nets, and {info.name} has none", where=path)
    config = ControlNetUnionConfig.from_diffusers(settings, path)
    check_base(config.control, info, path)
    return ControlFile(path, lambda: ControlNetUnion(config), tensor_files(path, STEM), kinds=config.kinds)
