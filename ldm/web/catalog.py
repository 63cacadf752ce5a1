"""What may be chosen by name: models, VAEs and LoRAs that were named when the server was started. No other file is
ever opened for a client.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.checkpoint import Model
from ldm.checkpoint.describe import ModelInfo, describe, text_without_weights
from ldm.checkpoint.lora import read_lora_header
from ldm.checkpoint.lora.read import FILE
from ldm.checkpoint.model import addable_parts, refuse_texts
from ldm.checkpoint.single import listed_texts
from ldm.checkpoint.types import check_prediction_type
from ldm.diffusion import names
from ldm.errors import ConfigError, nearest
from ldm.nn.text import TextEncoder
from ldm.pipeline.request import card_hires_strength, card_scale, resolve

LOADING = threading.Lock()  # held while parts are built: two threads at once cannot first import transformers' modules


@dataclass(frozen=True)
class Catalog:
    """Name -> what Pipeline takes for it; the first model is the default one."""

    models: Mapping[str, Any]
    vaes: Mapping[str, Path] = field(default_factory=dict)
    loras: Mapping[str, Path] = field(default_factory=dict)
    lora_dir: Path | None = None
    texts: tuple[Path, ...] = ()  # of the single files of SD3 and FLUX
    prediction_type: str | None = None  # of the one model; None: what it says

    @classmethod
    def of(
        cls,
        models: Sequence[Any],
        vaes: Sequence[Any],
        loras: Sequence[Any],
        lora_dir: Any,
        texts: Any = (),
        prediction_type: str | None = None,
    ) -> Catalog:
        """From what the command line or `ldm.web` was given. Raises ConfigError and ModelError before any work."""
        folder = None if lora_dir is None else Path(os.path.expanduser(lora_dir))
        if folder is not None and not folder.is_dir():
            raise ConfigError("no such folder", where=f"lora_dir {folder}")
        paths = [Path(os.path.expanduser(lora)) for lora in loras]
        for path in paths:
            read_lora_header(path)
        if folder is not None:
            paths += [path.parent if path.name == FILE else path for path in sorted(folder.rglob("*.safetensors"))]
        named = _named(models, "model"), _named(vaes, "vae"), _named(paths, "lora")
        if prediction_type is not None and len(named[0]) > 1:
            hint = "give one, or write the others anew by ldm convert --prediction-type"
            raise ConfigError(f"is of one model, and there are {len(named[0])}", where="prediction_type", hint=hint)
        if prediction_type is not None and isinstance(models[0], Model):
            raise ConfigError("a loaded model has its schedule already", where="prediction_type")
        found = cls(*named, folder, listed_texts(texts), check_prediction_type(prediction_type))
        for name in found.models:
            found.info(name)
        if texts and not any("text_encoders" in found.addable(name) for name in found.models):
            refuse_texts(texts, ", ".join(found.models))
        return found

    def pick(self, kind: str, name: object) -> Any:
        """The model, VAE or LoRA of this name. Raises ConfigError, with the nearest name."""
        table: Mapping[str, Any] = {"model": self.models, "vae": self.vaes, "lora": self.loras}[kind]
        if not isinstance(name, str) or name not in table:
            hint = nearest(str(name)[:80], list(table)[:50]) if table else f"none was given to ldm web (--{kind})"
            raise ConfigError(f"there is no {kind} {name!r:.80}", where=kind, hint=hint)
        return table[name]

    @property
    def default(self) -> str:
        return next(iter(self.models))

    @functools.lru_cache(maxsize=64)  # noqa: B019 - a catalogue lives as long as its server
    def info(self, model: str, vae: str | None = None) -> ModelInfo:
        """What is known of a model before its weights are read."""
        return describe(self.pick("model", model), **self.parts(model, vae))

    def parts(self, model: str, vae: str | None = None) -> dict[str, Any]:
        """Pipeline's keywords for what is not the model's own: the VAE of this name, what its file lacks or has wrong.

        A file without a VAE gets the first one.
        """
        parts: dict[str, Any] = {}
        addable = self.addable(model)
        if vae is None and "vae" in addable:
            vae = next(iter(self.vaes), None)
        if vae is not None:
            parts["vae"] = self.pick("vae", vae)
        if self.texts and "text_encoders" in addable:
            parts["text_encoders"] = self.texts
        if self.prediction_type is not None:
            parts["prediction_type"] = self.prediction_type
        return parts

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def addable(self, model: str) -> frozenset[str]:
        """The parts that may be given beside a model's file."""
        return addable_parts(self.pick("model", model))

    def text(self, model: str) -> TextEncoder:
        """A model's tokenizer and list of words, without weights."""
        with LOADING:
            return self._text(model)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _text(self, model: str) -> TextEncoder:
        texts = self.parts(model).get("text_encoders")
        return text_without_weights(self.pick("model", model), self.prediction_type, text_encoders=texts)

    def __hash__(self) -> int:
        return id(self)

    def described(self, model: str) -> dict[str, Any]:
        """What the page shows of a model: its own defaults, and which samplers and spacings go with it."""
        info = self.info(model)
        side = info.usual_side
        inpainting = info.unet.in_channels != info.latent_channels
        own = resolve({"height": side, "width": side}, info) if not inpainting else None
        flow = info.schedule.prediction_type == "flow"
        samplers = [name for name in names.SAMPLER_NAMES if _fits(name, info.schedule.prediction_type)]
        return {
            "name": model,
            "width": side,
            "height": side,
            "factor": info.multiple,
            "steps": own.num_inference_steps if own else 25,
            "guidance_scale": card_scale(info),
            "hires_strength": card_hires_strength(info),
            "sampler": own.sampler if own else "dpmpp_2m",
            "samplers": [{"name": name, "label": names.SAMPLER_NAMES[name][0]} for name in samplers],
            "spacings": [] if flow else [{"name": n, "label": ls[0]} for n, ls in names.SPACING_NAMES.items()],
            "prediction_type": info.schedule.prediction_type,
            "clip_layers": max(info.clip_layers, default=0),
            "inpainting": inpainting,
        }


def _fits(sampler: str, prediction_type: str) -> bool:
    try:
        names.check(sampler, prediction_type)
    except ConfigError:
        return False
    return True


def _named(values: Iterable[Any], kind: str) -> dict[str, Any]:
    """Each under its name: "default", a hub id, a folder's name, a file's without its suffix."""
    found: dict[str, Any] = {}
    for value in values:
        name = _name(value)
        if name in found and found[name] != value:
            raise ConfigError(f"two are named {name!r:.80}", where=kind, hint="rename one")
        found[name] = value
    return found


def _name(value: Any) -> str:
    if isinstance(value, Model):
        return value.name
    path = Path(os.fspath(value))
    if not path.exists():
        return str(value)
    return path.stem if path.is_file() else path.resolve().name
