"""What a fine-tuning trains: a loaded model with updates in the place of some layers, or with all its weights free."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ldm.checkpoint import Model, load_model
from ldm.checkpoint.lora import LoraHeader, Target, match_layers, networks, read_lora, target_of
from ldm.config import require
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, ModelError
from ldm.nn.lora import LowRank, attach, layers_of, meant, new_updates
from ldm.nn.text import ClipText, Conditioning, TextEncoder, XLText
from ldm.training.loop import seeded
from ldm.training.settings import FinetuneSettings

NEEDS_CLIP = "is for CLIP alone, and this model has {}: leave it out"


def load_base(settings: FinetuneSettings, device: torch.device) -> Model:
    """The model of the settings in fp32, all of it the run's own, under the schedule that the run trains with.

    Raises ConfigError and ModelError.
    """
    s = settings
    asked = None if s.prediction_type == "flow" else s.prediction_type
    model = load_model(s.model, device, torch.float32, s.vae, cache=False, prediction_type=asked)
    have, need = model.unet.config.in_channels, model.vae.latent_channels
    if have != need:
        what = f"its U-Net takes {have} channels, the autoencoder has {need}: an inpainting model, perhaps"
        raise ModelError(what, where=s.model, todo="fine-tune a text-to-image model")
    require(not s.text_encoder or _is_clip(model.text), NEEDS_CLIP.format(type(model.text).__name__), "text_encoder")
    model.unet.to(memory_format=torch.contiguous_format)  # the backward pass of GroupNorm is slow in channels-last
    model.unet.set_attention(s.attention)
    model.unet.gradient_checkpointing = s.gradient_checkpointing
    return dataclasses.replace(model, schedule=schedule_for(s, model.schedule))


def schedule_for(settings: FinetuneSettings, own: Schedule) -> Schedule:
    """The model's own schedule, changed as the settings say. Raises ConfigError for what does not go together."""
    s, changes = settings, {}
    if s.prediction_type is not None and s.prediction_type != own.prediction_type:
        require(s.train == "full", NO_CHANGE.format(own.prediction_type), "prediction_type")
        changes = {"prediction_type": s.prediction_type, "flow_shift": 1.0}
        changes |= {"rescale_betas_zero_snr": False} if s.prediction_type == "flow" else {}
    if s.zero_terminal_snr:
        changes |= {"rescale_betas_zero_snr": True, "spacing": "trailing"}
        blind = (s.prediction_type or own.prediction_type) == "epsilon"
        require(not blind, "needs v_prediction: of pure noise, epsilon tells nothing", "zero_terminal_snr")
    return dataclasses.replace(own, **changes)


NO_CHANGE = "the model was trained for {}, and a LoRA cannot change that: leave it out, or use train=full"


def _is_clip(text: TextEncoder) -> bool:
    parts = (text.first, text.second) if isinstance(text, XLText) else (text,)
    return all(isinstance(part, ClipText) for part in parts)


def make_module(settings: FinetuneSettings, model: Model) -> tuple[nn.Module, dict[str, str]]:
    """What is trained, in the place where it works, and the sha256 of what it starts from beside the model.

    The U-Net alone; with text encoders a ModuleDict of all networks, by their names in LoRA files. Changes `model`.
    Raises ConfigError for targets that there are not, ModelError for a LoRA that does not fit.
    """
    s, inputs = settings, {}
    found = networks(model)
    trained = found if s.text_encoder else {"unet": found["unet"]}
    if s.train == "full":
        for network in trained.values():
            network.requires_grad_(True)
    else:
        updates, inputs = _given(s, model) if s.init else (_new(s, trained), {})
        for part, own in updates.items():
            attach(trained[part], own)
    return nn.ModuleDict(trained) if s.text_encoder else found["unet"], inputs


def _new(settings: FinetuneSettings, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, LowRank]]:
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
    """The layers that `targets` mean in each part (part -> layer -> shape), in a text encoder those of its blocks.

    A name may be of one part alone; where a text encoder has none of them, its attention is taken. Raises ConfigError,
    also for a rank that is higher than that of any of their weights.
    """
    inner = {p: {n: s for n, s in own.items() if p == "unet" or ".layers." in n} for p, own in shapes.items()}
    found: dict[str, list[str]] = {}
    for part, own in inner.items():
        known = [target for target in targets if _means(own, target)]
        found[part] = meant(own, known or (targets if part == "unet" else ["attention"]))
    for target in targets:
        if not any(_means(own, target) for own in inner.values()):
            meant(inner["unet"], [target])  # says that there is none, and the nearest
    fullest = max((min(o, math.prod(i)), n) for p, names in found.items() for n in names for o, *i in [inner[p][n]])
    told = f"{rank} is more than any of these layers has: at most {fullest[0]}, that of {fullest[1]}"
    require(rank <= fullest[0], told, "lora_rank")
    return found


def _means(shapes: Mapping[str, tuple[int, ...]], target: str) -> bool:
    try:
        return bool(meant(shapes, [target]))
    except ConfigError:
        return False


def _given(settings: FinetuneSettings, model: Model) -> tuple[dict[str, dict[str, LowRank]], dict[str, str]]:
    """The updates of the LoRA to go on from, and its sha256."""
    lora = read_lora(settings.init)
    updates: dict[str, dict[str, LowRank]] = {}
    places = places_of(lora.header, target_of(model))
    for layer, (part, name) in places.items():
        updates.setdefault(part, {})[name] = lora.layers[layer]
    return updates, {"init": lora.hash}


def places_of(header: LoraHeader, target: Target) -> Mapping[str, tuple[str, str]]:
    """Where the layers of the LoRA to go on from belong (see `fit`).

    Raises ModelError where they do not fit, or could not be written for diffusers.
    """
    places = match_layers(header, target).layers
    kinds = {(part, "magnitude" in header.entries[layer].keys) for layer, (part, _) in places.items()}
    for part in dict.fromkeys(part for part, _ in kinds):
        if {(part, True), (part, False)} <= kinds:
            what = f"has LoRA and DoRA layers in its {part}, which diffusers' files cannot hold"
            raise ModelError(what, where=header.path, todo="go on from a file of one kind")
    return places


def encode(text: TextEncoder, captions: Sequence[str]) -> Conditioning:
    """The captions' embeddings with gradients, all in one batch; as `text.encode` otherwise, "" as None."""
    if not isinstance(text, XLText):
        return text.states(text.tokenize(list(captions)))
    first, second = (part.states(part.tokenize(list(captions)), 1, norm=False) for part in (text.first, text.second))
    states, pooled = torch.cat([first.states, second.states], dim=-1), second.pooled
    if text.zero_empty:
        there = states.new_tensor([bool(caption) for caption in captions])
        states, pooled = states * there[:, None, None], pooled * there[:, None]
    return Conditioning(states, pooled)
