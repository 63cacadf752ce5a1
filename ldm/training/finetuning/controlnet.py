"""The ControlNet that a run trains beside a model that stays as it is."""

from __future__ import annotations

import torch

from ldm.checkpoint import Model
from ldm.checkpoint.controlnet import find_controlnet, hash_of_controlnet
from ldm.checkpoint.describe import ModelInfo, describe
from ldm.errors import ModelError
from ldm.nn.controlnet import ControlNet, ControlNetConfig
from ldm.nn.unet_config import UNetConfig
from ldm.training.data.conditions import control_kind
from ldm.training.loop import seeded
from ldm.training.settings import FinetuneSettings


def check_controlnet(settings: FinetuneSettings, info: ModelInfo) -> None:
    """Raise ConfigError or ModelError, before weights are read, where no ControlNet can be trained like this."""
    s = settings
    control_kind(s.control or "")
    if not isinstance(info.unet, UNetConfig):
        raise ModelError("ControlNets steer U-Nets, and this model has none", where=s.model)
    if s.control_init is not None:
        find_controlnet(s.control_init, info)
        return
    ControlNetConfig.of_unet(info.unet, info.factor, info.latent_channels, s.control_channels, s.control_embedding)


def make_controlnet(settings: FinetuneSettings, model: Model) -> tuple[ControlNet, dict[str, str]]:
    """What is trained, and the sha256 of the ControlNet that it goes on from; all of the model is frozen."""
    s = settings
    for network in (model.unet, *model.text.modules):
        network.requires_grad_(False)
    if s.control_init is not None:
        found = find_controlnet(s.control_init, describe(model))
        net = found.load(model.device, torch.float32).to(memory_format=torch.contiguous_format).requires_grad_(True)
        return net, {"control_init": hash_of_controlnet(found.path)}
    torch.manual_seed(seeded.key(s.seed, "control"))
    widths, embedding = s.control_channels, s.control_embedding
    net = ControlNet.from_unet(model.unet, model.vae.factor, model.vae.latent_channels, widths, embedding)
    return net.to(model.device).requires_grad_(True), {}
