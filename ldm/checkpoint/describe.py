"""What is known of a model from its configs and headers alone, before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint import build, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint.hub import is_hub_id
from ldm.checkpoint.model import is_single, resolve, settings_of
from ldm.checkpoint.safety import read_header
from ldm.checkpoint.single.read import named
from ldm.checkpoint.types import Model
from ldm.console import progress
from ldm.diffusion.schedule import Schedule
from ldm.errors import ModelError
from ldm.files import sha256
from ldm.nn.unet_config import UNetConfig

LARGE = 1 << 30  # bytes from which on hashing shows a bar
CLIP_LAYERS = 12  # transformers' default


@dataclass(frozen=True)
class ModelInfo:
    """What settings are checked against and completed from."""

    name: str  # "default", a folder's or file's name, a hub id
    path: Path | None  # the folder or file; None for a model made in memory
    unet: UNetConfig
    schedule: Schedule
    latent_channels: int
    factor: int  # pixels per latent
    clip_layers: tuple[int, ...]  # of each of CLIP's text encoders; () for T5
    card: Mapping[str, Any]  # how the model is best drawn with: sampler, num_inference_steps, guidance_scale, spacing
    hash: str = ""  # that of the loaded model; "" where nobody asked for it

    @property
    def inpaints(self) -> bool:
        """Whether the U-Net has channels for a mask and the latents of what it does not cover."""
        return self.unet.in_channels == 2 * self.latent_channels + 1


def describe(
    model: str | Path | Model = "default",
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    hashed: bool = False,
) -> ModelInfo:
    """A model after every check that needs no weight; of a hub id only the settings are fetched.

    `vae` and `prediction_type` stand in place of the model's own. `hashed`: with the hash that the loaded model would
    have; it comes from the manifest where there is one, else all weights are read for it; another VAE is left out of
    it. Raises ModelError in one line, as loading does.
    """
    if isinstance(model, Model):
        return _of_loaded(model)
    asked, skip = single.check_prediction_type(prediction_type), ("vae",) if vae is not None else ()
    place = resolve(model, weights=hashed)
    if is_single(place):
        plan = single.plan_of(place, asked, skip)
        name, configs, card, t5 = place.stem, plan.configs, plan.card, False
        with named(place):
            unet = UNetConfig.from_diffusers(configs["unet"], place)
            schedule = Schedule.from_diffusers(dict(configs["scheduler"]))
    else:
        hub = is_hub_id(str(model))
        layout = (layouts.read_configs if hub and not hashed else layouts.read_layout)(place, skip)
        name = str(model) if hub or str(model) == "default" else place.resolve().name
        configs, card = layout.configs, layouts.read_card(place)
        t5 = layout.text_class("text_encoder") in layouts.T5
        unet, schedule = build.unet_config(layout), Schedule.from_diffusers(dict(configs["scheduler"]))
    if vae is not None and is_single(Path(vae)):
        single.vae_prefix(read_header(vae), Path(vae))
    if asked is not None:
        schedule = dataclasses.replace(schedule, prediction_type=asked)
    of_vae = {} if vae is None else settings_of(resolve(vae, weights=hashed)).get("vae", {})
    of_vae = of_vae or configs.get("vae", {})
    texts = [config for part, config in configs.items() if part.startswith("text_encoder")]
    return ModelInfo(
        name=name,
        path=place.resolve(),
        unet=unet,
        schedule=schedule,
        latent_channels=of_vae.get("latent_channels", 4),
        factor=2 ** (len(of_vae.get("block_out_channels", (0,))) - 1),
        clip_layers=() if t5 else tuple(config.get("num_hidden_layers", CLIP_LAYERS) for config in texts),
        card=_own_settings(layouts.card_settings(card or "")),
        hash=_hash(place, skip) if hashed else "",
    )


def _of_loaded(model: Model) -> ModelInfo:
    vae, unet, card = model.vae, model.unet.config, _own_settings(model.info)
    channels, layers = vae.latent_channels, model.text.clip_layers
    return ModelInfo(model.name, model.path, unet, model.schedule, channels, vae.factor, layers, card, hash=model.hash)


def _own_settings(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a card's settings that says how to draw."""
    found = card.get("ldm")
    return found if isinstance(found, Mapping) else {}


def _hash(place: Path, skip: tuple[str, ...]) -> str:
    """The hash of the loaded model: a file's own sha256, or one over all files of a folder that are read."""
    if is_single(place):
        size = place.stat().st_size
        with progress(total=size, desc=f"hashing {place.name}", unit="B", disable=size < LARGE) as bar:
            return sha256(place, bar.update)
    layout = layouts.read_layout(place, skip)
    weights = [path for part in layout.weights for path in layout.shards(part)]
    names = [*layout.settings(), *(path.relative_to(place).as_posix() for path in weights)]
    unlisted = [place / name for name in names if name not in layout.manifest]
    total = sum(path.stat().st_size for path in unlisted)
    with progress(total=total, desc=f"hashing {place.name}", unit="B", disable=total < LARGE) as bar:
        hashed = {path.relative_to(place).as_posix(): sha256(path, bar.update) for path in unlisted}
    return layouts.digest_of({name: hashed.get(name) or layout.manifest[name]["sha256"] for name in names})


def hash_of(path: str | Path) -> str:
    """sha256 of a file, or of every file of a folder (an autoencoder's). Raises ModelError where it cannot be read."""
    path = Path(path).expanduser()
    try:
        if not path.is_dir():
            return sha256(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return layouts.digest_of({file.relative_to(path).as_posix(): sha256(file) for file in files})
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror or error})", where=path) from None
