"""What `controlnet` may name: a ControlNet, a ControlNet Union or a T2I-Adapter, told by settings or tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm.checkpoint.controlnet import HINT_DIFFUSERS, STEM, check_base, config_of_base, find_controlnet, place_of
from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.network_files import CONFIG, read_checked, reading_settings, tensor_files, tensors_on_meta
from ldm.checkpoint.safety import read_json
from ldm.checkpoint.t2i_adapter import check_t2i_base, is_t2i_adapter, t2i_config, t2i_names
from ldm.errors import ModelError
from ldm.nn.batch_invariant import layout
from ldm.nn.controlnet_union import ControlNetUnion, ControlNetUnionConfig
from ldm.nn.t2i_adapter import T2IAdapter, config_of
from ldm.nn.unet_config import UNetConfig
from ldm.nn.weights import check_keys, load_weights, on_meta

UNION = "task_embedding"  # a tensor that ControlNet Unions alone have


@dataclass(frozen=True)
class ControlFile:
    """A network of diffusers' folder, or of a single file, that fits a model."""

    path: Path
    build: Callable[[], Any]
    files: tuple[Path, ...]
    kinds: int = 0  # of a ControlNet Union
    cell: int = 1  # pixels that have to divide height and width
    names: Mapping[str, str] = field(default_factory=dict)  # tensor in the files -> in the network, where it is another

    def load(self, device: torch.device, dtype: torch.dtype) -> Any:
        """In eval mode, without gradients. Raises ModelError for weights that are damaged or not finite in `dtype`."""
        state = read_checked(self.path, self.files, dtype, device)
        state = {self.names.get(key, key): tensor for key, tensor in state.items()}
        net: nn.Module = load_weights(on_meta(self.build), state, self.path).requires_grad_(False)
        return net.to(memory_format=layout(device, dtype))


def find_control(name: str | os.PathLike, info: ModelInfo) -> Any:
    """The network of a folder, a file or a hub id, checked to fit a model. Raises ModelError; reads no weight."""
    path = place_of(name)
    if path.is_file():
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors_on_meta([path]).items()}
        if is_t2i_adapter(shapes):
            return _found(path, lambda: _t2i_file(shapes, info, path))
        return _found(path, lambda: _union_file(shapes, info, path)) if UNION in shapes else find_controlnet(name, info)
    settings = read_json(path / CONFIG)
    if settings.get("_class_name") == "T2IAdapter":
        return _found(path, lambda: _t2i_folder(settings, info, path))
    if "num_control_type" in settings or settings.get("_class_name") == "ControlNetUnionModel":
        return _found(path, lambda: _union_folder(settings, info, path))
    return find_controlnet(name, info)


def _found(path: Path, read: Callable[[], ControlFile]) -> ControlFile:
    with reading_settings(path):
        found = read()
        network = on_meta(found.build)
    on_files = tensors_on_meta(found.files)
    check_keys(network, {found.names.get(key, key): tensor for key, tensor in on_files.items()}, path)
    return found


def _check_unet(what: str, info: ModelInfo, path: Path) -> None:
    if not isinstance(info.unet, UNetConfig):
        raise ModelError(f"{what} steer U-Nets, and {info.name} has none", where=path)


def _t2i_folder(settings: Mapping[str, Any], info: ModelInfo, path: Path) -> ControlFile:
    _check_unet("T2I-Adapters", info, path)
    config = config_of(settings)
    check_t2i_base(config, info, path)
    return ControlFile(path, lambda: T2IAdapter(config), tensor_files(path, STEM), cell=config.downscale_factor)


def _t2i_file(shapes: Mapping[str, tuple[int, ...]], info: ModelInfo, path: Path) -> ControlFile:
    _check_unet("T2I-Adapters", info, path)
    names = t2i_names(shapes, path)
    config = t2i_config({names[key]: shape for key, shape in shapes.items()}, info, path)
    check_t2i_base(config, info, path)
    return ControlFile(path, lambda: T2IAdapter(config), (path,), cell=config.downscale_factor, names=names)


def _union_folder(settings: Mapping[str, Any], info: ModelInfo, path: Path) -> ControlFile:
    _check_unet("ControlNets", info, path)
    config = ControlNetUnionConfig.from_diffusers(settings, path)
    check_base(config.control, info, path)
    return ControlFile(path, lambda: ControlNetUnion(config), tensor_files(path, STEM), kinds=config.kinds)


def _union_file(shapes: Mapping[str, tuple[int, ...]], info: ModelInfo, path: Path) -> ControlFile:
    """Under diffusers' names, as the larger of xinsir's is; the settings are the model's."""
    _check_unet("ControlNets", info, path)
    if HINT_DIFFUSERS not in shapes:
        raise ModelError("holds no whole ControlNet Union", where=path, hint="get the file again")
    layers = len({key.split(".")[1] for key in shapes if key.startswith("transformer_layes.")})
    control = config_of_base(shapes, info, path)
    config = ControlNetUnionConfig(control, shapes[UNION][0], heads=1, layers=layers)
    check_base(control, info, path)
    return ControlFile(path, lambda: ControlNetUnion(config), (path,), kinds=config.kinds)
