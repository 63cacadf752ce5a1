"""From what a line asks to all that decides its picture: the model's defaults filled in, every file hashed."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.describe import ModelInfo, describe, hash_of
from ldm.errors import ConfigError, LdmError
from ldm.pipeline.adapters import Adapter, take_adapters
from ldm.pipeline.checks import check_guidance, check_prompts, check_variations
from ldm.pipeline.drawing import ImageRequest
from ldm.pipeline.engine import Engine
from ldm.pipeline.keywords import GUIDANCE_WORDS
from ldm.pipeline.request import Settings, card_scale, resolve
from ldm.pipeline.sources import DIGESTS, check_sources
from ldm.prompts import check as check_grammar
from ldm.render.jobs.loaded_models import known

if TYPE_CHECKING:
    from ldm.checkpoint import Model
    from ldm.pipeline.sources import Sources

OWN = ("prompt", "negative_prompt", "seed", "guidance_scale", "lora")  # of a picture, not of a call
VARIED = ("variation_seed", "variation_strength")  # likewise
BEGINS = ("image", "mask_image", "outpaint")  # likewise; the size may come from them
OF_MODEL = ("model", "vae", "dtype")  # of the rest, what is no setting of a call
CALL = tuple(field.name for field in dataclasses.fields(Settings) if field.name not in ("guidance", "runs"))
REMEMBERED = 1 << 12  # combinations of settings, and hashes of files


class Resolver:
    """Resolves what lines ask for: `resolve(asked) -> (settings, hashes)`, the same for equal lines; reads no weight.

    lora_dir  where <lora:name:0.8> in prompts finds its file
    dtype     in the settings (and so in the keys) unless it is auto, so that a run may go on on another machine
    loaded    the model of lines that name none, where it is in memory (see ldm.render.jobs.loaded_models)
    painter   Engine's other words: device, offload, attention, prediction_type, allow_unapplied

    Settings are JSON, None and what changes nothing left out. Raises LdmError for what cannot be drawn.
    """

    def __init__(
        self,
        lora_dir: str | os.PathLike | None = None,
        dtype: str = "auto",
        loaded: Model | None = None,
        **painter: Any,
    ):
        self._lora_dir, self._dtype, self._painter_words = lora_dir, dtype, painter
        self._own, self._loaded = ("default", None) if loaded is None else known(loaded)
        self._models: dict[tuple[str, str | None], tuple[Engine, ModelInfo] | LdmError] = {}
        self._shared: dict[tuple, tuple[dict[str, Any], Settings, Sources | None]] = {}
        self._fitting: dict[tuple, LdmError | None] = {}
        self._hash = functools.lru_cache(REMEMBERED)(hash_of)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the arguments alone (no loaded model), and looks at files for itself."""
        return functools.partial(Resolver, **self._painter_words), (self._lora_dir, self._dtype)

    @property
    def device(self) -> str:
        """As it was asked for."""
        return str(self._painter_words.get("device", "auto"))

    def __call__(self, asked: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        prompt, adapters = self._prompt(asked)
        negative = asked.get("negative_prompt", "")
        check_grammar(negative or "", where="negative_prompt")
        shared, _, sources = self._settings(_not_own(asked))
        painter, info = self.model(shared)
        scale = asked.get("guidance_scale")
        settings = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": asked["seed"],
            "guidance_scale": card_scale(info) if scale is None else check_guidance(scale),
            **shared,
            **_variation(asked),
        }
        hashes: dict[str, Any] = {"model": info.hash, **_digests(sources)}
        if "vae" in shared:
            hashes["vae"] = self._hash(shared["vae"])
        if adapters:
            self._check_fit(painter, adapters)
            settings["lora"] = [[str(adapter.path), adapter.weight] for adapter in adapters]
            hashes["lora"] = [[self._hash(str(adapter.path)), adapter.weight] for adapter in adapters]
        return settings, hashes

    def model(self, settings: Mapping[str, Any]) -> tuple[Engine, ModelInfo]:
        """Who draws with a line's model, and what is known of it. Raises ModelError, the same each time."""
        name = settings.get("model", self._own), settings.get("vae")
        if name not in self._models:
            try:
                self._models[name] = self._look_at(*name)
            except LdmError as error:
                self._models[name] = error
        return _or_raise(self._models[name])

    def _look_at(self, name: str, vae: str | None) -> tuple[Engine, ModelInfo]:
        given = {"vae": vae, "dtype": self._dtype, **self._painter_words}
        if self._loaded is not None and name == self._own:
            return Engine(self._loaded, **given), describe(self._loaded)
        return Engine(name, **given), describe(name, vae, self._painter_words.get("prediction_type"), hashed=True)

    def drawable(self, settings: Mapping[str, Any]) -> tuple[Engine, Settings]:
        """Who draws resolved settings, and with what is shared by all that may be in one batch."""
        sized = ("height", "width") if "outpaint" in settings else ()  # the picture's and what it grows by
        shared = {name: value for name, value in _not_own(settings).items() if name not in sized}
        return self.model(settings)[0], self._settings(shared)[1]

    def _prompt(self, asked: Mapping[str, Any]) -> tuple[str, tuple[Adapter, ...]]:
        """(the prompt without its tags, its LoRAs: the line's or the command's, then those of tags)."""
        given = asked.get("lora")
        lora = None if given is None else [(path, weight) for path, weight in given]
        texts = check_prompts(asked["prompt"]), (asked.get("negative_prompt"),)
        (prompt,), _, (adapters,) = take_adapters(*texts, lora, self._lora_dir)
        check_grammar(prompt)
        return prompt, adapters

    def _check_fit(self, painter: Engine, adapters: tuple[Adapter, ...]) -> None:
        key = id(painter), *(adapter.path for adapter in adapters)
        if key not in self._fitting:
            try:
                self._fitting[key] = painter.check(adapters)
            except LdmError as error:
                self._fitting[key] = error
        _or_raise(self._fitting[key])

    def _settings(self, shared: Mapping[str, Any]) -> tuple[dict[str, Any], Settings, Sources | None]:
        """What a line's picture may share with others, as settings of a job and as those of a call; and its sources."""
        if shared.get("image") is not None:
            return self._new_settings(shared)
        key = tuple(sorted((name, _hashable(value)) for name, value in shared.items()))
        if key not in self._shared:
            if len(self._shared) == REMEMBERED:
                self._shared.pop(next(iter(self._shared)))
            self._shared[key] = self._new_settings(shared)
        return self._shared[key]

    def _new_settings(self, shared: Mapping[str, Any]) -> tuple[dict[str, Any], Settings, Sources | None]:
        _, info = self.model(shared)
        asked = {name: value for name, value in shared.items() if name not in OF_MODEL and value is not None}
        if unknown := asked.keys() - {*CALL, *GUIDANCE_WORDS, *BEGINS}:
            raise ConfigError("is not supported in prompt files", where=min(unknown), todo="leave it out")
        sources = check_sources(asked, 1, 1)
        settings = resolve(asked, info, sources)
        begins = {} if sources is None else {name: asked[name] for name in BEGINS if name in asked}
        return {**self._of_model(shared), **told(settings), **begins}, settings, sources

    def _of_model(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        own = {"model": shared.get("model", self._own), "vae": shared.get("vae")}
        own["dtype"] = None if self._dtype == "auto" else self._dtype
        return {name: str(value) for name, value in own.items() if value is not None}


def told(settings: Settings) -> dict[str, Any]:
    """generate's keywords of resolved settings, but for those that are at what changes nothing."""
    neutral = {field.name: field.default for field in dataclasses.fields(settings)} | {"guidance": "cfg"}
    neutral["guidance_rescale"] = 0.0
    found = {n: v for n, v in settings.keywords().items() if v is not None and v != neutral.get(n)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def picture(settings: Mapping[str, Any]) -> ImageRequest:
    """One job's own part of resolved settings."""
    own = {name: settings[name] for name in OWN if name != "lora"}
    own["adapters"] = adapters_of(settings)
    if "variation_seed" in settings:
        own["variation"] = settings["variation_seed"], settings["variation_strength"]
    if "image" in settings:
        sources = check_sources({name: settings.get(name) for name in BEGINS}, 1, 1)
        (own["source"],) = sources.fitted(settings["height"], settings["width"])
    return ImageRequest(**own)


def adapters_of(settings: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The LoRAs of resolved settings."""
    return tuple(Adapter(Path(path), weight) for path, weight in settings.get("lora", ()))


def _not_own(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in (*OWN, *VARIED)}


def _variation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The variation's words, where there is one. Raises ConfigError: its seed is never drawn."""
    if asked.get("variation_strength") and asked.get("variation_seed") in (None, -1):
        raise ConfigError("a variation needs its own seed", where="variation_seed", todo="give a number")
    found = check_variations(asked, 1, 1)
    return {} if found is None else dict(zip(VARIED, found[0]))


def _digests(sources: Sources | None) -> dict[str, Any]:
    """What stands for the files of sources in a job's key: their pixels."""
    told = {} if sources is None else sources.each[0].told
    return {name: told[digest] for name, digest in DIGESTS.items() if digest in told}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else tuple(value.items()) if isinstance(value, dict) else value


def _or_raise(value: Any) -> Any:
    if isinstance(value, LdmError):
        raise value
    return value
