"""What a fine-tuning trains: a loaded model with low-rank updates of some layers, or with all its weights free."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ldm.checkpoint import Model, load_model
from ldm.checkpoint.describe import ModelInfo, describe
from ldm.checkpoint.lora import networks
from ldm.checkpoint.model import load_vae_of
from ldm.config import require
from ldm.device import half_dtype
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, ModelError
from ldm.nn.lora import LowRank, attach, layers_of, meant, new_updates
from ldm.training.distributed import current
from ldm.training.finetuning.continued import continued_updates
from ldm.training.finetuning.controlnet import make_controlnet
from ldm.training.finetuning.text_encoder import require_clip
from ldm.training.loop import seeded
from ldm.training.settings import FinetuneSettings

LORA_KEEPS = "the model was trained for {}, and a LoRA cannot change that: leave it out, or use train=full"


def load_base(settings: FinetuneSettings, device: torch.device) -> Model:
    """The model of the settings in fp32, read for this run alone. Raises ConfigError and ModelError.

    On a GPU a network that stays as it is beside its updates is kept in the 16 bits that it computes in; of SD3 and
    FLUX, whose parts are large, the text encoders too, and nothing is in fp32 on the way. For FSDP2 all is on the CPU,
    whatever the device (unless a prior is drawn with it first): the network goes from there in shards.
    """
    s = settings
    there = torch.device("cpu") if current().sharded and not s.prior_images else device
    frozen = frozen_dtype(s, device)
    large = frozen != torch.float32 and describe_base(s).transformer is not None
    first = frozen if large else torch.float32
    model = read_base(s, there, first)
    if large:
        model.vae = load_vae_of(model, s.vae, device=there, dtype=torch.float32)
    model.unet.to(frozen)
    have, need = model.unet.config.in_channels, model.vae.latent_channels
    if have != need:
        what = f"its network takes {have} channels, the autoencoder has {need}: an inpainting model, perhaps"
        raise ModelError(what, where=s.model, hint="fine-tune a text-to-image model")
    if s.text_encoder:
        require_clip(model.text)
    return model


def describe_base(settings: FinetuneSettings, prediction_type: str | None = None) -> ModelInfo:
    """What is known of the settings' model without its weights, with this prediction type in place of its own."""
    s = settings
    return describe(s.model, s.vae, prediction_type, text_encoders=s.text_encoders)


def read_base(settings: FinetuneSettings, device: torch.device, dtype: torch.dtype) -> Model:
    """The settings' model, apart from all others that are loaded."""
    s = settings
    asked, texts = asked_prediction(s), s.text_encoders
    return load_model(s.model, device, dtype, s.vae, cache=False, prediction_type=asked, text_encoders=texts)


def asked_prediction(settings: FinetuneSettings) -> str | None:
    """The prediction type that the model is read with; None: its own, as where it is to learn to predict the flow."""
    return None if settings.prediction_type == "flow" else settings.prediction_type


def frozen_dtype(settings: FinetuneSettings, device: torch.device) -> torch.dtype:
    """What the U-Net's own weights are kept in; fp32 on a CPU, whose bits stay, where they are trained, and for FSDP2,
    which wants one dtype in a layer."""
    half = half_dtype(settings.precision, device)
    frozen = settings.train in ("lora", "dora") and device.type != "cpu" and not current().sharded
    return half if half is not None and frozen else torch.float32


def for_training(settings: FinetuneSettings, model: Model) -> Model:
    """A loaded model with the schedule of the settings; its U-Net is changed in place. Raises ConfigError."""
    model.unet.to(memory_format=torch.contiguous_format)  # the backward pass of GroupNorm is slow in channels-last
    model.unet.set_attention(settings.attention)
    model.unet.gradient_checkpointing = settings.gradient_checkpointing
    return dataclasses.replace(model, schedule=schedule_for(settings, model.schedule))


def schedule_for(settings: FinetuneSettings, schedule: Schedule) -> Schedule:
    """The model's schedule, changed as the settings say. Raises ConfigError for settings that exclude each other."""
    s, changes = settings, {}
    if s.prediction_type is not None and s.prediction_type != schedule.prediction_type:
        require(s.train == "full", LORA_KEEPS.format(schedule.prediction_type), "prediction_type")
        changes = {"prediction_type": s.prediction_type, "flow_shift": 1.0}
        changes |= {"rescale_betas_zero_snr": False} if s.prediction_type == "flow" else {}
    if s.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "spacing": "trailing"}
        epsilon = (s.prediction_type or schedule.prediction_type) == "epsilon"
        require(not epsilon, "needs v_prediction: of pure noise, epsilon tells nothing", "zero_terminal_snr")
    return dataclasses.replace(schedule, **changes)


def make_module(settings: FinetuneSettings, model: Model) -> tuple[nn.Module, dict[str, str]]:
    """What is trained, inside of `model`, and the sha256 of the LoRA that it continues.

    The U-Net alone; with text encoders a ModuleDict of all networks, by their names in LoRA files; or a ControlNet
    beside them. Changes `model`.
    Raises ConfigError for targets that do not exist, ModelError for a LoRA that does not fit.
    """
    s, inputs = settings, {}
    if s.train == "control":
        return make_controlnet(s, model)
    parts = networks(model)
    trained = parts if s.text_encoder else {"unet": parts["unet"]}
    if s.train == "full":
        for network in trained.values():
            network.requires_grad_(True)
    else:
        updates, inputs = continued_updates(s, model) if s.init else (_new_updates(s, trained), {})
        for part, layers in updates.items():
            attach(trained[part], layers)
    return nn.ModuleDict(trained) if s.text_encoder else parts["unet"], inputs


def _new_updates(settings: FinetuneSettings, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, LowRank]]:
    s = settings
    shapes = {part: {n: tuple(layer.weight.shape) for n, layer in layers_of(m).items()} for part, m in networks.items()}
    updates = {}
    for part, names in chosen_layers(shapes, s.targets, s.lora_rank).items():
        draws = seeded.generator(s.seed, "lora", part)
        updates[part] = new_updates(networks[part], names, s.lora_rank, s.alpha, s.train == "dora", draws)
    return updates


def chosen_layers(
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]], targets: Sequence[str], rank: int
) -> dict[str, list[str]]:
    """The layers that `targets` mean in each part (part -> layer -> shape); of a text encoder those of its blocks.

    A target may exist in one part alone; where a text encoder has none of them, its attention is trained. Raises
    ConfigError, also for a rank that is higher than that of any of these weights.
    """
    inner = {p: {n: s for n, s in layers.items() if p == "unet" or ".layers." in n} for p, layers in shapes.items()}
    chosen: dict[str, list[str]] = {}
    for part, layers in inner.items():
        known = [target for target in targets if _means(layers, target)]
        chosen[part] = meant(layers, known or (targets if part == "unet" else ["attention"]))
    for target in targets:
        if not any(_means(layers, target) for layers in inner.values()):
            meant(inner["unet"], [target])  # raises, with the nearest name
    highest = max((min(o, math.prod(i)), n) for p, names in chosen.items() for n in names for o, *i in [inner[p][n]])
    what = f"{rank} is more than any of these layers has: at most {highest[0]}, that of {highest[1]}"
    require(rank <= highest[0], what, "lora_rank")
    return chosen


def _means(shapes: Mapping[str, tuple[int, ...]], target: str) -> bool:
    try:
        return bool(meant(shapes, [target]))
    except ConfigError:
        return False
