"""The autoencoder and text encoder that a network is trained with, and its settings that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.checkpoint.parts import Place, TextParts, VaePart, find_text, find_vae
from ldm.config import build, require
from ldm.errors import ConfigError
from ldm.nn.mmdit import MMDiT, MMDiTConfig
from ldm.nn.mmdit_init import new_mmdit
from ldm.nn.unet import UNet
from ldm.nn.unet_config import UNetConfig
from ldm.training.settings import Settings, TextSettings, UNetSettings

TYPES = ("unet", "mmdit")  # of networks that are trained from nothing
TIME_DIM = 256  # XL's width of each of the six sizes


def vae_part(settings: TextSettings | UNetSettings, weights: bool = True) -> VaePart:
    """The autoencoder of the settings. Raises ModelError, and ConfigError where the resolution does not fit it."""
    part = find_vae(settings.vae, settings.vae_subfolder, weights, settings.vae_scaling_factor)
    side = settings.data.resolution
    require(side % part.factor == 0, f"{side} is not a multiple of the autoencoder's {part.factor}", "data.resolution")
    return part


def text_parts(settings: UNetSettings, weights: bool = True) -> TextParts:
    """The text encoder of the settings, or the pair. Raises ModelError."""
    s = settings
    return find_text(s.text, s.text_subfolder, s.text_2, s.text_2_subfolder, weights)


def pinned_names(settings: Settings) -> dict[str, str]:
    """Setting -> hub id with its commit, of parts on the hub, of which the settings alone are fetched."""
    places: dict[str, Place] = {}
    if isinstance(settings, (TextSettings, UNetSettings)):
        places["vae"] = vae_part(settings, weights=False).place
    if isinstance(settings, UNetSettings):
        places |= dict(zip(("text", "text_2"), text_parts(settings, weights=False).places))
    return {name: place.name for name, place in places.items() if place.commit}


def fingerprints(settings: Settings) -> dict[str, str]:
    """The digest of each part that the run reads, by setting."""
    if not isinstance(settings, (TextSettings, UNetSettings)):
        return {}
    found = {"vae": vae_part(settings).fingerprint}
    if isinstance(settings, UNetSettings):
        found |= dict(zip(("text", "text_2"), text_parts(settings).fingerprints))
    return found


def network_config(settings: UNetSettings, vae: VaePart, text: TextParts) -> UNetConfig | MMDiTConfig:
    """The settings of the network: of a U-Net, or with `type: mmdit` of a flow transformer.

    Raises ConfigError where the user's contradict the parts.
    """
    return mmdit_config(settings, vae, text) if is_mmdit(settings) else unet_config(settings, vae, text)


def new_network(config: UNetConfig | MMDiTConfig) -> UNet | MMDiT:
    """The network of these settings with random weights."""
    return new_mmdit(config) if isinstance(config, MMDiTConfig) else UNet(config)


def is_mmdit(settings: UNetSettings) -> bool:
    """Whether the settings ask for a flow transformer. Raises ConfigError for an unknown type."""
    kind = settings.model.get("type", "unet")
    require(kind in TYPES, f"unknown type {kind!r:.80}: choose from {', '.join(TYPES)}", "model.type")
    return kind == "mmdit"


def mmdit_config(settings: UNetSettings, vae: VaePart, text: TextParts) -> MMDiTConfig:
    """The flow transformer's settings: those of the user, and what the parts decide. It reads with one CLIP.

    Raises ConfigError where the user's contradict the parts, and for a schedule that is not SD3's kind of flow.
    """
    s, given = settings, {name: value for name, value in settings.model.items() if name != "type"}
    require(not s.text_2 and len(text.encoders) == 1, "a transformer is trained with one text encoder", "text_2")
    require(text.encoders[0].form != "t5", "a transformer needs pooled text, and T5 has none: give CLIP", "text")
    asked = s.schedule.get("prediction_type") == "flow" and s.schedule.get("whole_timesteps", True) is False
    what = "a transformer is told exact times of a flow: {prediction_type: flow, whole_timesteps: false}"
    require(asked, what, "schedule")
    channels, side = vae.latent_channels, s.data.resolution // vae.factor
    patch = given.get("patch_size", 2)
    require(isinstance(patch, int) and patch > 0 and side % patch == 0, f"has to divide {side}", "model.patch_size")
    fixed = {"in_channels": channels, "out_channels": channels}
    fixed |= {"joint_attention_dim": text.width, "pooled_projection_dim": text.width}
    for name, value in fixed.items():
        if given.get(name, value) != value:
            what = f"asks for {given[name]}, but {s.vae} and {_texts(s)} make it {value}"
            raise ConfigError(what, where=f"model.{name}", hint="leave it out")
    return build(MMDiTConfig, {"sample_size": side, "pos_embed_max_size": side // patch, **given, **fixed}, "model")


def unet_config(settings: UNetSettings, vae: VaePart, text: TextParts) -> UNetConfig:
    """The U-Net's settings: those of the user, and what the parts decide.

    Raises ConfigError where the user's contradict the parts.
    """
    s, given = settings, {name: value for name, value in settings.model.items() if name != "type"}
    channels, side = vae.latent_channels, s.data.resolution // vae.factor
    fixed: dict[str, tuple[Any, str]] = {  # setting -> (value, where it comes from)
        "in_channels": (channels, f"the autoencoder {s.vae} has {channels} latent channels"),
        "out_channels": (channels, f"the autoencoder {s.vae} has {channels} latent channels"),
        "cross_attention_dim": (text.width, f"the text of {_texts(s)} is {text.width} wide"),
    }
    if text.pooled is not None:
        each = given.get("addition_time_embed_dim") or TIME_DIM
        fixed["addition_embed_type"] = ("text_time", "two text encoders make a model of XL")
        total = (6 * each + text.pooled, f"the pooled text of {_texts(s)} is {text.pooled} wide")
        fixed |= {"addition_time_embed_dim": (each, ""), "projection_class_embeddings_input_dim": total}
    elif given.get("addition_embed_type") == "text_time":
        what = f"text_time needs two text encoders, and {s.text} has one"
        raise ConfigError(what, where="model.addition_embed_type", hint="give text_2=… too, or leave it out")
    for name, (value, why) in fixed.items():
        if given.get(name, value) != value:
            raise ConfigError(f"asks for {given[name]}, but {why}", where=f"model.{name}", hint="leave it out")
    decided: Mapping[str, Any] = {name: value for name, (value, _) in fixed.items()}
    return build(UNetConfig, {"sample_size": side, **given, **decided}, "model")


def _texts(settings: UNetSettings) -> str:
    return f"{settings.text} and {settings.text_2}" if settings.text_2 else settings.text
