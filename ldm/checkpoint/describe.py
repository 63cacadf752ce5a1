"""Describe a model by its configs and headers alone, before any weight is read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoint import build, few_steps, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint.folder import is_hub_id
from ldm.checkpoint.model import is_single, refuse_texts, resolve, vae_settings
from ldm.checkpoint.safety import read_header
from ldm.checkpoint.single.plan import named, network_of
from ldm.checkpoint.single.read import text_on_meta
from ldm.checkpoint.types import Model, check_prediction_type
from ldm.console import progress
from ldm.diffusion.diffusers_config import read_stepping
from ldm.diffusion.schedule import Schedule
from ldm.errors import ConfigError, ModelError
from ldm.files import sha256
from ldm.nn.mmdit_config import MMDiTConfig
from ldm.nn.text import TextEncoder, reads_with_t5
from ldm.nn.unet_config import UNetConfig

LARGE = 1 << 30  # bytes from which on hashing shows a bar
CLIP_LAYERS = 12  # transformers' default
LATENT_SIZE = 64  # of models that do not say at which size they draw


@dataclass(frozen=True)
class ModelInfo:
    """The facts about a model that settings are checked against and completed from."""

    name: str  # "default", a folder's or file's name, a hub id
    path: Path | None  # the folder or file; None for a model made in memory
    unet: UNetConfig | MMDiTConfig  # of the network that denoises
    schedule: Schedule
    latent_channels: int
    factor: int  # pixels per latent
    clip_layers: tuple[int, ...]  # of each of CLIP's text encoders; () where T5's states alone are read
    card: Mapping[str, Any]  # its defaults: sampler, num_inference_steps, guidance_scale, spacing
    hash: str = ""  # of the loaded model; "" unless it was asked for
    notes: tuple[str, ...] = ()  # what of its settings ours replace, and whether it was made for few steps
    doubts: tuple[str, ...] = ()  # what its name says and nothing inside
    few: few_steps.Sampling | None = None  # how it, or a LoRA, wants to be drawn with where it was made for few steps
    t5: bool = False  # whether T5 reads the prompts, alone or beside CLIP
    cell: int = 1  # pixels that have to divide height and width for what is used beside it, such as a T2I-Adapter

    @property
    def transformer(self) -> MMDiTConfig | None:
        """The settings of a flow transformer (SD3, FLUX); None for a U-Net."""
        return self.unet if isinstance(self.unet, MMDiTConfig) else None

    @property
    def multiple(self) -> int:
        """What divides height and width: pixels per latent, times the transformer's patch size, and `cell`."""
        return math.lcm(self.factor * (self.transformer.patch_size if self.transformer else 1), self.cell)

    @property
    def side(self) -> int:
        """Height and width in pixels that the model was trained on; 0 where that is not known."""
        return (self.unet.sample_size or 0) * self.factor

    @property
    def usual_side(self) -> int:
        """Height and width in pixels where none are given: `side`, or Stable Diffusion 1's where that is not known."""
        return self.side or LATENT_SIZE * self.factor

    def card_number(self, name: str, kind: Callable, default: Any, most: float = 1000) -> Any:
        """A setting from the model's card, as a number above 0. Raises ConfigError where it is none."""
        value = self.card.get(name, default)
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if 0 < kind(value) <= most:
                return kind(value)
        hint = f"mend the card (README.md), or give {name} yourself"
        raise ConfigError(f"the model's card says {value!r:.80}", where=name, hint=hint)

    def tokens(self, height: int, width: int) -> int | None:
        """How many tokens an image of so many pixels is for the transformer; None for a U-Net."""
        return (height // self.multiple) * (width // self.multiple) if self.transformer else None


def describe(
    model: str | os.PathLike | Model = "default",
    vae: str | os.PathLike | None = None,
    prediction_type: str | None = None,
    hashed: bool = False,
    text_encoders: Any = None,
) -> ModelInfo:
    """A description of the model after every check that needs no weight; only the settings of a hub id are fetched.

    `vae` and `prediction_type` replace the model's; `text_encoders` are those that a single file lacks. `hashed` adds
    the loaded model's hash (without another VAE), from the manifest or by reading all weights. Raises ModelError as
    loading does.
    """
    if isinstance(model, Model):
        refuse_texts(text_encoders, model.path)
        return _of_loaded(model)
    override = None if prediction_type is None else check_prediction_type(prediction_type)
    skip = ("vae",) if vae is not None else ()
    path = resolve(model, weights=hashed)
    if is_single(path):
        name, configs, card, header, unet, schedule = _of_file(path, override, skip, text_encoders)
    else:
        refuse_texts(text_encoders, path)
        hub = str(model) != "default" and is_hub_id(str(model))
        layout = (layouts.read_configs if hub and not hashed else layouts.read_layout)(path, skip)
        name = str(model) if hub or str(model) == "default" else path.resolve().name
        configs, card, header, unet = layout.configs, layouts.read_card(path), {}, build.network_config(layout)
        schedule = build.schedule_of(configs["scheduler"], configs[layout.network])
    if override is not None:
        schedule = _predicting(override, schedule, unet)
    vae_config = configs.get("vae", {}) if vae is None else vae_settings(resolve(vae, weights=hashed))
    stepping, note = read_stepping(configs["scheduler"])
    drawing = _drawing_settings(layouts.card_settings(card or ""))
    found = None
    if not drawing and name != "default" and "unet" in configs:
        found = few_steps.of_model(name, configs["scheduler"], configs["unet"], header)
    few = found.sampling if found else None
    notes = [line for line in (note, found and not found.doubtful and found.line) if line]
    texts = [config for part, config in configs.items() if part.startswith("text_encoder")]
    clips = [config for config in texts if config.get("model_type") != "t5"]
    read = [] if isinstance(unet, MMDiTConfig) and unet.is_flux else clips  # whose states the network gets
    return ModelInfo(
        name=name,
        path=path.resolve(),
        unet=unet,
        schedule=schedule,
        latent_channels=vae_config.get("latent_channels", 4),
        factor=2 ** (len(vae_config.get("block_out_channels", (0,))) - 1),
        clip_layers=tuple(config.get("num_hidden_layers", CLIP_LAYERS) for config in read),
        card={**_usual(unet), **stepping, **(few.defaults if few else {}), **drawing},
        hash=_hash(path, skip, single.listed_texts(text_encoders)) if hashed else "",
        notes=tuple(notes),
        doubts=(found.line,) if found and found.doubtful else (),
        few=few,
        t5=len(clips) < len(texts),
    )


def _of_file(path: Path, override: str | None, skip: tuple[str, ...], text_encoders: Any) -> tuple[Any, ...]:
    """Name, configs, card, metadata of the header, the network's config and schedule of a single file."""
    plan = single.plan_of(path, override, skip, texts=single.listed_texts(text_encoders))
    configs = plan.configs
    with named(path):
        unet, schedule = network_of(plan), build.schedule_of(configs["scheduler"], configs[plan.network])
    return path.stem, configs, plan.card, plan.header.metadata, unet, schedule


def _predicting(prediction_type: str, schedule: Schedule, unet: UNetConfig | MMDiTConfig) -> Schedule:
    """The schedule with another prediction type. Raises ConfigError where the network predicts the flow."""
    if isinstance(unet, MMDiTConfig):
        raise ConfigError("a flow transformer predicts the flow", where="prediction_type", hint="leave it out")
    return dataclasses.replace(schedule, prediction_type=prediction_type)


def _usual(config: UNetConfig | MMDiTConfig) -> Mapping[str, Any]:
    """What a flow transformer's pages say: of SD3, FLUX.1-dev and FLUX.1-schnell."""
    if not isinstance(config, MMDiTConfig):
        return {}
    scale, steps = (7.0, 28) if not config.is_flux else (3.5, 28) if config.guidance_embeds else (1.0, 4)
    return {"sampler": "euler", "guidance_scale": scale, "num_inference_steps": steps}


def text_without_weights(
    model: str | os.PathLike | Model, prediction_type: str | None = None, text_encoders: Any = None
) -> TextEncoder:
    """A model's text encoder that can tokenize and not encode: for checks of prompts. Raises ModelError."""
    if isinstance(model, Model):
        return model.text
    place = resolve(model)
    if is_single(place):
        texts = single.listed_texts(text_encoders)
        return text_on_meta(single.plan_of(place, prediction_type, ("vae",), texts=texts))
    layout = layouts.read_layout(place, ("vae",))
    headers = {part: [read_header(path).tensors for path in layout.shards(part)] for part in layout.texts()}
    states = {
        part: {name: torch.empty(tensor.shape, device="meta") for table in tables for name, tensor in table.items()}
        for part, tables in headers.items()
    }
    return build.build_text(layout, states)


def _of_loaded(model: Model) -> ModelInfo:
    vae, unet = model.vae, model.unet.config
    return ModelInfo(
        name=model.name,
        path=model.path,
        unet=unet,
        schedule=model.schedule,
        latent_channels=vae.latent_channels,
        factor=vae.factor,
        clip_layers=model.text.clip_layers,
        card={**_usual(unet), **_drawing_settings(model.info)},
        hash=model.hash,
        t5=reads_with_t5(model.text),
    )


def _drawing_settings(card: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a card that are the model's defaults for drawing."""
    settings = card.get("ldm")
    return settings if isinstance(settings, Mapping) else {}


def _hash(root: Path, skip: tuple[str, ...], texts: tuple[Path, ...] = ()) -> str:
    """The hash of the loaded model: a file's sha256 (of several files one), or one over all files of a folder that
    loading reads."""
    if is_single(root):
        plan = single.plan_of(root, "epsilon", skip, strict=False, texts=texts)
        files = [one.path for one in plan.files]
        size = sum(path.stat().st_size for path in files)
        with progress(total=size, desc=f"hashing {root.name}", unit="B", disable=size < LARGE) as bar:
            digests = [sha256(path, bar.update) for path in files]
        return single.hash_of_files([*digests, *single.digests_of_given(plan.tokenizers)])
    layout = layouts.read_layout(root, skip)
    weights = [path for part in layout.weights for path in layout.shards(part)]
    names = [*layout.settings(), *(path.relative_to(root).as_posix() for path in weights)]
    unlisted = [name for name in names if name not in layout.manifest]
    total = sum((root / name).stat().st_size for name in unlisted)
    with progress(total=total, desc=f"hashing {root.name}", unit="B", disable=total < LARGE) as bar:
        digests = {name: sha256(root / name, bar.update) for name in unlisted}
    return layouts.digest_of({name: digests.get(name) or layout.manifest[name]["sha256"] for name in names})


def hash_of(path: str | Path) -> str:
    """sha256 of a file, or of every file of a folder (an autoencoder's). Raises ModelError where it cannot be read."""
    path = Path(os.path.expanduser(path))
    try:
        if not path.is_dir():
            return sha256(path)
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        return layouts.digest_of({file.relative_to(path).as_posix(): sha256(file) for file in files})
    except OSError as error:
        raise ModelError(f"cannot be read ({error.strerror or error})", where=path) from None
