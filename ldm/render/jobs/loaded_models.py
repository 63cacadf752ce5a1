"""Models that are handed over in memory: what stands for them in the keys of jobs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch

from ldm.checkpoint import Model
from ldm.checkpoint.describe import describe
from ldm.diffusion.diffusers_config import write_scheduler
from ldm.errors import ConfigError, LdmError


def name_of_loaded(model: Any) -> tuple[str, Model]:
    """(what manifests call a loaded model, itself with the hash that keys are made of). Raises ConfigError.

    One that is what its folder or file holds keeps that name and hash, so that either is the same job. Any other (made
    in memory, with LoRAs or another autoencoder) is hashed over its weights, and no manifest can name it.
    """
    if not isinstance(model, Model):
        raise ConfigError(f"expected a name, a path or a loaded model, got {type(model).__name__}", where="model")
    if _as_its_files(model):
        return "default" if model.name == "default" else str(model.path), model
    digest = weights_hash(model)
    return f"loaded:{digest[:12]}", dataclasses.replace(model, hash=digest)


def _as_its_files(model: Model) -> bool:
    if model.path is None or not model.hash or model.info.get("lora"):
        return False
    try:
        info = describe(str(model.path), hashed=True)
    except LdmError:
        return False
    return info.hash == model.hash and info.schedule == model.schedule


def weights_hash(model: Model) -> str:
    """sha256 over all weights of a model, their names and types, and the settings that decide its images."""
    vae = model.vae
    settings = [dataclasses.asdict(model.unet.config), write_scheduler(model.schedule)]
    settings += [vae.scaling_factor, vae.shift_factor, type(model.text).__name__]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for module in (model.unet, vae.module, *model.text.modules):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
