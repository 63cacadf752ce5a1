"""IP-Adapters and CLIP's vision towers on disk: found and fitted to a model by settings and headers alone.

An adapter is a single file under the original names; a tower is a folder of transformers, or on the hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint.describe import ModelInfo
from ldm.checkpoint.folder import is_hub_id
from ldm.checkpoint.network_files import (
    CONFIG,
    check_text_width,
    hash_of_network,
    network_on_hub,
    read_checked,
    reading_settings,
    tensor_files,
    tensors_on_meta,
)
from ldm.checkpoint.safety import read_json, read_tensors, refuse_pickle
from ldm.errors import ConfigError, ModelError
from ldm.nn.ip_adapter import IPAdapter, IPAdapterConfig, cross_attentions
from ldm.nn.unet import UNet
from ldm.nn.unet_config import UNetConfig
from ldm.nn.vision import VisionTower, load_vision
from ldm.nn.weights import check_keys, on_meta

PARTS = ("image_proj.", "ip_adapter.")
FACES = {  # a part of a name -> what has such names
    "image_proj.perceiver_resampler.": "an IP-Adapter FaceID Plus, which is not supported",
    "_lora.": "an IP-Adapter FaceID with a LoRA, which is not supported",
    "image_proj.norm.": "an IP-Adapter FaceID, which is not supported",
}
STEM, SUBFOLDER = "model", "image_encoder"
TOWER = ("vision_model.", "visual_projection.")  # beginnings of a tower's names, in a file of a whole CLIP too
NO_FACE = "it sees faces by InsightFace, which is not here; plus-face looks at a photo of a face by CLIP alone"
HINT = "give the folder or hub id of a CLIPVisionModelWithProjection: image_encoder, --image-encoder FOLDER"


@dataclass(frozen=True)
class IPAdapterFile:
    """An IP-Adapter on disk that fits a model."""

    path: Path
    config: IPAdapterConfig

    def load(self, device: torch.device, dtype: torch.dtype) -> IPAdapter:
        """In eval mode. Raises ModelError for weights that are damaged or not finite in `dtype`."""
        state, _ = read_tensors(self.path, dtype, device)
        net = on_meta(lambda: IPAdapter(self.config))
        net.load_state_dict(state, strict=True, assign=True)
        return net.eval().requires_grad_(False)


def find_ip_adapter(name: str | os.PathLike, info: ModelInfo) -> IPAdapterFile:
    """The adapter of a file, checked to fit a model. Raises ConfigError, ModelError; reads no weight."""
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigError(f"expected a file, got {name!r:.80}", where="ip_adapter")
    path = Path(os.path.expanduser(name))
    if not isinstance(info.unet, UNetConfig):
        raise ModelError(f"IP-Adapters go with U-Nets, and {info.name} has none", where=path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such IP-Adapter"
        raise ModelError(what, where=path, hint="name its .safetensors file")
    if "faceid" in path.name.lower() and path.suffix != ".safetensors":  # else a user would convert it in vain
        raise ModelError("is an IP-Adapter FaceID by its name, which is not supported", where=path, hint=NO_FACE)
    refuse_pickle(path)
    on_file = tensors_on_meta([path])
    shapes = {key: tuple(tensor.shape) for key, tensor in on_file.items()}
    try:
        config = _config(shapes, info, path)
    except (IndexError, KeyError, ValueError):
        raise ModelError("holds no whole IP-Adapter", where=path, hint="get the file again") from None
    if left := check_keys(on_meta(lambda: IPAdapter(config)), on_file, path):
        raise ModelError(f"has keys that no IP-Adapter has ({', '.join(left[:5])})", where=path)
    return IPAdapterFile(path, config)


def _config(shapes: Mapping[str, tuple[int, ...]], info: ModelInfo, path: Path) -> IPAdapterConfig:
    """What the shapes say, checked to be of the model's family."""
    if not all(any(key.startswith(part) for key in shapes) for part in PARTS):
        raise ModelError("holds no IP-Adapter (image_proj.…, ip_adapter.…)", where=path)
    plain = "image_proj.proj.weight" in shapes
    for mark, kind in FACES.items():
        if any(mark in key for key in shapes) and not (plain and mark == "image_proj.norm."):
            raise ModelError(f"is {kind}", where=path, hint=NO_FACE)
    family = "choose an IP-Adapter that was trained for this model's family"
    check_text_width(shapes["ip_adapter.1.to_k_ip.weight"][1], info, path, family)
    layers = cross_attentions(on_meta(lambda: UNet(info.unet)))
    of = {"layers": tuple(layer.to_k.out_features for layer in layers.values())}
    if plain:
        (wide, features), (width,) = shapes["image_proj.proj.weight"], shapes["image_proj.norm.weight"]
        return IPAdapterConfig("plain", width, features, tokens=wide // width, **of)
    if "image_proj.proj.3.weight" in shapes:
        (width,), (features, _) = shapes["image_proj.proj.3.weight"], shapes["image_proj.proj.0.weight"]
        return IPAdapterConfig("full", width, features, **of)
    _, tokens, hidden = shapes["image_proj.latents"]
    features, (width,) = shapes["image_proj.proj_in.weight"][1], shapes["image_proj.norm_out.weight"]
    inner = shapes["image_proj.layers.0.0.to_q.weight"][0]
    depth = len({key.split(".")[2] for key in shapes if key.startswith("image_proj.layers.")})
    return IPAdapterConfig("plus", width, features, tokens=tokens, hidden=hidden, inner=inner, depth=depth, **of)


# The tower


@dataclass(frozen=True)
class VisionFile:
    """A vision tower on disk."""

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    def load(self, device: torch.device, dtype: torch.dtype) -> VisionTower:
        """In eval mode. Raises ModelError for weights that are damaged or do not fit."""
        state = read_checked(self.path, self.files, dtype, device, _is_towers)
        return load_vision(self.config, state, self.path)

    @property
    def hash(self) -> str:
        """One sha256 over its settings and weights."""
        return hash_of_network(self.path, STEM)


def find_vision(name: Any, adapters: Sequence[IPAdapterFile], model: Path | None) -> VisionFile:
    """The tower that is named, or the folder `image_encoder` beside the adapters or in the model's folder; checked to
    fit the adapters.

    Raises ConfigError where there is none, ModelError where it does not fit; reads no weight.
    """
    path = _place(name, adapters, model)
    settings = read_json(path / CONFIG)
    inside = settings.get("vision_config", settings)
    if not isinstance(inside, dict) or "clip" not in str(settings.get("model_type", "clip")):
        raise ModelError("holds no vision tower of CLIP", where=path, hint=HINT)
    config = {**inside, "projection_dim": settings.get("projection_dim", inside.get("projection_dim", 512))}
    files = tensor_files(path, STEM)
    on_files = tensors_on_meta(files)
    with reading_settings(path):
        tower = on_meta(lambda: VisionTower(config))
    check_keys(tower.model, {key: tensor for key, tensor in on_files.items() if _is_towers(key)}, path)
    for adapter in adapters:
        given = tower.projected if adapter.config.pooled else tower.width
        if given != adapter.config.features:
            what = f"is for a vision tower of width {adapter.config.features}, and {path} gives {given}"
            raise ModelError(what, where=adapter.path, hint="give the tower that it was trained with")
    return VisionFile(path, config, files)


def _is_towers(key: str) -> bool:
    return key.startswith(TOWER) and not key.endswith("position_ids")


def _place(name: Any, adapters: Sequence[IPAdapterFile], model: Path | None) -> Path:
    if name is None:
        places = [adapter.path.parent / SUBFOLDER for adapter in adapters]
        places += [] if model is None else [model / SUBFOLDER]
        found = next((place for place in places if (place / CONFIG).is_file()), None)
        if found is None:
            raise ConfigError("an IP-Adapter needs CLIP's vision tower", where="image_encoder", hint=HINT)
        return found
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        raise ConfigError(f"expected a folder or a hub id, got {name!r:.80}", where="image_encoder")
    if is_hub_id(os.fspath(name)):
        return network_on_hub(os.fspath(name), STEM)
    path = Path(os.path.expanduser(name))
    for folder in (path, path / SUBFOLDER):
        if (folder / CONFIG).is_file():
            return folder
    what = "holds no vision tower" if path.is_dir() else "no such folder"
    raise ModelError(f"{what} ({CONFIG} is not there)", where=path, hint=HINT)
