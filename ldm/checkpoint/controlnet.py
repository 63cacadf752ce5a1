"""ControlNets on disk: diffusers' folders, and single files under the original names or diffusers'.

A ControlNet is found and fitted to its base model by settings and headers alone; loading then reads each file once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.folder import is_hub_id, write_json
from ldm.checkpoint.network_files import (
    CONFIG,
    check_text_width,
    hash_of_network,
    network_on_hub,
    read_checked,
    reading_settings,
    tensor_files,
)
from ldm.checkpoint.safety import read_header, read_json, refuse_pickle, write_manifest
from ldm.checkpoint.single.names import translated, unet_modules
from ldm.checkpoint.tensors import source, write_shards, write_tensors
from ldm.errors import ConfigError, ModelError
from ldm.files import atomic_folder, atomic_write, require_space, sha256
from ldm.nn.batch_invariant import layout
from ldm.nn.controlnet import ControlNet, ControlNetConfig, load_controlnet
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.unet_config import UNetConfig
from ldm.nn.weights import check_keys, on_meta

KEY = "ldm.controlnet"  # in the header of our single files: config.json
PREFIX = "control_model."  # of the original names
STEM, CLASS = "diffusion_pytorch_model", "ControlNetModel"
SUBFOLDER = "controlnet"  # of a pipeline's folder, and of our runs
HINT, HINT_DIFFUSERS = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"
RELATIVES = {  # a part of a name -> what has such names, beside a ControlNet's
    "lora_controlnet": "a Control-LoRA, which is not supported",
    "difference": "a ControlNet as the difference to its base model, which is not supported",
    "control_add_embedding.": "a ControlNet Union, which is not supported here",
}
OTHERS = {  # likewise, without a ControlNet's
    "lllite": "a ControlNet-LLLite, which is not supported",
    "style_embedding": "a style adapter of T2I-Adapter's, which is not supported",
    "adapter.": "a T2I-Adapter, which is not supported here",
    "image_proj.": "an IP-Adapter, which has its own option (--ip-adapter)",
    "controlnet_x_embedder.": "a ControlNet for FLUX, which is not supported",
    "pos_embed.": "a ControlNet for Stable Diffusion 3, which is not supported",
    "lora_": "a LoRA, which goes with a model (--lora)",
}


@dataclass(frozen=True)
class ControlNetFile:
    """A ControlNet on disk that fits a model."""

    name: str  # as it was given
    path: Path  # its folder or file
    config: ControlNetConfig
    files: tuple[Path, ...]  # of the weights
    names: Mapping[str, str]  # tensor in the files -> in the network

    def load(self, device: torch.device, dtype: torch.dtype) -> ControlNet:
        """In eval mode, without gradients. Raises ModelError for weights that are damaged or not finite in `dtype`."""
        tensors = read_checked(self.path, self.files, dtype, device, self.names.__contains__)
        state = {self.names[key]: tensor for key, tensor in tensors.items()}
        net = load_controlnet(self.config, state, self.path).requires_grad_(False)
        return net.to(memory_format=layout(device, dtype, self.config))


def find_controlnet(name: str | os.PathLike, info: ModelInfo) -> ControlNetFile:
    """The ControlNet of a folder, a file or a hub id, checked to fit a model. Raises ModelError; reads no weight.

    A single file of another program has no settings: it gets the model's.
    """
    if not isinstance(info.unet, UNetConfig):
        raise ModelError(f"ControlNets steer U-Nets, and {info.name} has none", where=name)
    path = place_of(name)
    config, files = None, (path,)
    if path.is_dir():
        config = _config(read_json(path / CONFIG), path / CONFIG)
        files = tensor_files(path, STEM)
    headers = [read_header(file) for file in files]
    shapes = {key: tensor.shape for header in headers for key, tensor in header.tensors.items()}
    _check_kind(shapes, path)
    if config is None and KEY in headers[0].metadata:
        config = _config(_stored(headers[0].metadata[KEY], path), path)
    config = config or config_of_base(shapes, info, path)
    check_base(config, info, path)
    names = _names(config, shapes, path)
    on_files = {new: torch.empty(shapes[old], device="meta") for old, new in names.items()}
    check_keys(on_meta(lambda: ControlNet(config)), on_files, path)
    return ControlNetFile(os.fspath(name), path, config, files, names)


def hash_of_controlnet(path: Path) -> str:
    """One sha256 over the settings and weights of a ControlNet's folder, or a file's own."""
    if path.is_file():
        return sha256(path)
    return hash_of_network(path, STEM)


def place_of(name: str | os.PathLike) -> Path:
    """Its folder (also of a pipeline's folder or a run that holds one), its file, or the hub's copy."""
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigError(f"expected a folder, a file or a hub id, got {name!r:.80}", where="controlnet")
    if is_hub_id(os.fspath(name)):
        return network_on_hub(os.fspath(name), STEM)
    path = Path(os.path.expanduser(name))
    if not path.exists():
        raise ModelError("no such ControlNet", where=path, hint="name its folder or its .safetensors file")
    if path.is_file():
        refuse_pickle(path)
        return path
    for folder in (path, path / SUBFOLDER, path / "model" / SUBFOLDER):
        if (folder / CONFIG).is_file():
            return folder
    raise ModelError(f"holds no ControlNet ({CONFIG} is not there)", where=path)


def _config(settings: Mapping[str, Any], where: Path) -> ControlNetConfig:
    kind = settings.get("_class_name", CLASS)
    if kind != CLASS:
        raise ModelError(f"is of class {kind!r:.80}, and a ControlNet is {CLASS}", where=where)
    with reading_settings(where):
        return ControlNetConfig.from_diffusers(settings, where)


def _stored(text: str, where: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ModelError("the settings in its header cannot be used", where=where, hint="get the file again")
    return settings


def _check_kind(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise ModelError, by its name, where these tensors are no ControlNet's."""
    whole = any(key.endswith((HINT, HINT_DIFFUSERS)) for key in shapes)
    for mark, kind in {**RELATIVES, **({} if whole else OTHERS)}.items():
        if any(mark in key for key in shapes):
            raise ModelError(f"is {kind}", where=path)
    if not whole:
        raise ModelError("holds no ControlNet", where=path)


def config_of_base(shapes: Mapping[str, tuple[int, ...]], info: ModelInfo, path: Path) -> ControlNetConfig:
    """The settings of a file without any: the model's U-Net's, and what shapes say of the image's embedding."""
    prefix, hint = _hint(shapes)
    layers = [shapes[f"{prefix}{name}.weight"] for name in hint if f"{prefix}{name}.weight" in shapes]
    if len(layers) < 2 or any(len(shape) != 4 for shape in layers):
        raise ModelError("holds no whole ControlNet", where=path)
    width = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    if width is not None:
        _check_width(width, info, path)
    unet = replace(info.unet, in_channels=info.latent_channels, time_cond_proj_dim=None)
    return ControlNetConfig(unet, layers[0][1], tuple(shape[0] for shape in layers[:-1:2]))


def _hint(shapes: Mapping[str, Any]) -> tuple[str, list[str]]:
    """(what stands before the names, the layers of the image's embedding in their order)."""
    first = next(key for key in shapes if key.endswith((HINT, HINT_DIFFUSERS)))
    if first.endswith(HINT):
        count = sum("input_hint_block." in key and key.endswith(".weight") for key in shapes)
        return first.removesuffix(HINT), [f"input_hint_block.{2 * i}" for i in range(count)]
    head = "controlnet_cond_embedding."
    count = sum(f"{head}blocks." in key and key.endswith(".weight") for key in shapes)
    layers = ["conv_in", *(f"blocks.{i}" for i in range(count)), "conv_out"]
    return first.removesuffix(HINT_DIFFUSERS), [head + layer for layer in layers]


def _check_width(width: int, info: ModelInfo, path: Path) -> None:
    if isinstance(info.unet, MMDiTConfig):
        raise ModelError(f"goes with a U-Net, and the model {info.name} is a flow transformer", where=path)
    check_text_width(width, info, path)


def check_base(config: ControlNetConfig, info: ModelInfo, path: Path) -> None:
    """Raise ModelError where a ControlNet's outputs, or its inputs, are not those of the model's U-Net."""
    _check_width(config.unet.cross_attention_dim, info, path)
    mine = {"latent channels": config.unet.in_channels, "pixels per latent": config.factor}
    wanted: dict[str, Any] = {"latent channels": info.latent_channels, "pixels per latent": info.factor}
    mine["block_out_channels"], wanted["block_out_channels"] = config.outputs, info.unet.block_out_channels
    for name in ("layers_per_block", "addition_embed_type"):
        mine[name], wanted[name] = getattr(config.unet, name), getattr(info.unet, name)
    mine["projection"] = config.unet.projection_class_embeddings_input_dim
    wanted["projection"] = info.unet.projection_class_embeddings_input_dim
    if config.conditioning_channels != 3:
        raise ModelError(f"reads images of {config.conditioning_channels} channels, not of 3", where=path)
    for name, value in mine.items():
        if value != wanted[name]:
            what = f"does not fit {info.name}: it has {name} {value}, and the model {wanted[name]}"
            raise ModelError(what, where=path, hint="choose a ControlNet that was trained for this model's family")


def controlnet_modules(config: ControlNetConfig) -> dict[str, str]:
    """Module in the original code -> in diffusers'."""
    ends = ("up_blocks.", "conv_norm_out", "conv_out")
    table = {old: new for old, new in unet_modules(config.unet).items() if not new.startswith(ends)}
    count = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    layers = ["conv_in", *(f"blocks.{i}" for i in range(count)), "conv_out"]
    table |= {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(layers)}
    levels = len(config.unet.block_out_channels)
    outputs = 1 + levels * config.unet.layers_per_block + levels - 1
    table |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(outputs)}
    return {**table, "middle_block_out.0": "controlnet_mid_block"}


def _names(config: ControlNetConfig, shapes: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Tensor in the files -> in the network. Raises ModelError for tensors that a ControlNet has none of."""
    prefix, _ = _hint(shapes)
    modules = {} if any(key.endswith(HINT_DIFFUSERS) for key in shapes) else controlnet_modules(config)
    inside = {key: key.removeprefix(prefix) for key in shapes if key.startswith(prefix)}
    names = {key: translated(name, modules) for key, name in inside.items()}
    if unknown := [key for key, name in names.items() if name is None]:
        listed = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise ModelError(f"has {len(unknown)} keys that no ControlNet of this model has ({listed})", where=path)
    return {key: name for key, name in names.items() if name is not None}


def save_controlnet(
    net: ControlNet, path: str | os.PathLike, dtype: torch.dtype = torch.float16, readme: str | None = None
) -> Path:
    """Write diffusers' folder, or a file of the original names where `path` ends with .safetensors; atomically.

    `readme`: the text of the folder's README.md.
    Raises ModelError for weights that are not finite in `dtype`, ResourceError where it cannot be written.
    """
    path, config = Path(path), net.control.to_diffusers()
    require_space(path.parent, sum(p.numel() for p in net.parameters()) * dtype.itemsize + 10_000_000)
    if path.suffix == ".safetensors":
        return _save_single(net, path, dtype)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not _is_controlnet(path)):
        raise ModelError("exists and is no ControlNet", where=path, hint="choose a new folder")
    with atomic_folder(path) as new:
        write_json(new / CONFIG, {**config, "_diffusers_version": version("diffusers")})
        write_shards(new, STEM, net.state_dict(), dtype, 5_000_000_000)
        if readme is not None:
            (new / "README.md").write_text(readme, encoding="utf-8")
        write_manifest(new)
    return path


def _is_controlnet(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name") == CLASS


def _save_single(net: ControlNet, path: Path, dtype: torch.dtype) -> Path:
    back = {new: old for old, new in controlnet_modules(net.control).items()}
    sources = {}
    for name, tensor in net.state_dict().items():
        key = f"{PREFIX}{translated(name, back)}"
        sources[key] = source(tensor, dtype, key, path)
    metadata = {"format": "pt", KEY: json.dumps(net.control.to_diffusers(), sort_keys=True)}
    return atomic_write(path, lambda temporary: write_tensors(temporary, sources, metadata))
