"""From a line's settings to all that decides its image: the model's defaults filled in, every file hashed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ldm import console
from ldm.checkpoint import Model
from ldm.checkpoint.describe import ModelInfo, describe, hash_of
from ldm.errors import ConfigError, LdmError
from ldm.pipeline.adapters import Adapter, take_adapters, with_few_steps
from ldm.pipeline.checks import check_bool, check_guidance, check_prompts, check_variations
from ldm.pipeline.control import Controls, check_controls, control_warnings, listed
from ldm.pipeline.engine import Engine
from ldm.pipeline.fast import check_beside, fast_adapter
from ldm.pipeline.ip_adapter import ImagePrompts, check_image_prompts
from ldm.pipeline.request import ImageRequest, Settings, card_scale, check_scales, resolve, size_warnings
from ldm.pipeline.sources import DIGESTS, Sources, check_sources
from ldm.prompts import Prompt
from ldm.render.jobs.loaded_models import name_of_loaded
from ldm.render.prompts.setting_table import IMAGE, SETTINGS, of_scope

INITIAL = ("image", "mask_image", "outpaint")  # where an image begins; the size may come from it
FILES = ("image", "control_image", "ip_adapter_image", "ip_adapter_scale")  # of lines that are resolved each anew
OF_IMAGE = {"lora", *of_scope(IMAGE)} - {*INITIAL, "control_image", "ip_adapter_image", "ip_adapter_mask"}
OF_MODEL = ("model", "vae", "dtype", "quantization")
REMEMBERED = 1 << 12  # combinations of settings, and hashes of files

Resolved = tuple[dict[str, Any], dict[str, Any]]  # settings with every default, and the digest of each file they name


class Resolver:
    """Resolves a line's settings: `resolve(asked) -> (settings, hashes)`, the same for equal lines; reads no weight.

    lora_dir  where <lora:name:0.8> in prompts finds its file
    loaded    the model of lines without one, where it is in memory (see ldm.render.jobs.loaded_models)
    fast      whether every line is drawn with the shipped few-step LoRA too, as Pipeline's `fast`
    engine    Engine's other keywords: device, attention, prediction_type, …

    Settings are JSON, None and what changes nothing left out: a dtype of auto too, so that a run may go on on another
    machine. Raises LdmError for what cannot be drawn.
    """

    def __init__(self, lora_dir: Any = None, loaded: Model | None = None, fast: bool = False, **engine: Any):
        self._lora_dir, self._options = lora_dir, engine
        self._fast = functools.lru_cache(REMEMBERED)(fast_adapter) if check_bool(fast, "fast") else None
        self._default, self._loaded = ("default", None) if loaded is None else name_of_loaded(loaded)
        self._models: dict[tuple, tuple[Engine, ModelInfo] | LdmError] = {}
        self._shared: dict[tuple, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._fitting: dict[tuple, LdmError | None] = {}
        self._warned: set[str] = set()
        self._hash = functools.lru_cache(REMEMBERED)(hash_of)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is sent the arguments alone (no loaded model), and looks at files for itself."""
        return functools.partial(Resolver, fast=self._fast is not None, **self._options), (self._lora_dir,)

    @property
    def device(self) -> str:
        """As it was asked for."""
        return str(self._options.get("device", "auto"))

    def __call__(self, asked: Mapping[str, Any]) -> Resolved:
        prompt, adapters = self._prompt(asked)
        negative = asked.get("negative_prompt", "")
        Prompt.parse(negative or "", where="negative_prompt")
        of_batch = {name: value for name, value in asked.items() if name not in OF_IMAGE}
        shared, digests = self._remembered(of_batch, adapters)
        engine, info = self.model(shared)
        if adapters:
            info = with_few_steps(info, (adapters,))
        scale = asked.get("guidance_scale")
        scale = card_scale(info) if scale is None else check_guidance(scale)
        check_scales([scale], info)
        settings = {
            "prompt": prompt,
            "negative_prompt": negative,
            "seed": asked["seed"],
            "guidance_scale": scale,
            **shared,
            **_variation(asked),
            **({"prediction_type": engine.prediction_type} if engine.prediction_type else {}),
        }
        if info.few is not None:
            self._warn(info.few.remarks(asked))
        hashes: dict[str, Any] = {"model": info.hash, **digests, **engine.hashes_of_attached()}
        if "vae" in shared:
            hashes["vae"] = self._hash(shared["vae"])
        if "text_encoders" in shared:
            hashes["text_encoders"] = "in the model's"
        if adapters:
            paths = (adapter.path for adapter in adapters)
            _once(self._fitting, (id(engine), *paths), lambda: engine.check(adapters))
            settings["lora"] = [adapter.as_list() for adapter in adapters]
            hashes["lora"] = [[self._hash(str(adapter.path)), *adapter.as_list()[1:]] for adapter in adapters]
            if (dora := self._options.get("dora_scaling", "linear")) != "linear":
                settings["dora_scaling"] = dora
        return settings, hashes

    def model(self, settings: Mapping[str, Any]) -> tuple[Engine, ModelInfo]:
        """The engine that draws with a line's model, and the facts about it. Raises ModelError, the same each time."""
        asked: dict[str, Any] = {"dtype": settings.get("dtype") or "auto"}
        asked |= {word: settings.get(word) for word in ("vae", "image_encoder", "quantization")}
        asked |= {word: listed(settings.get(word)) or None for word in ("controlnet", "ip_adapter", "text_encoders")}
        model = settings.get("model", self._default)
        return _once(self._models, (model, *asked.values()), lambda: self._engine(model, asked))

    def _engine(self, model: str, asked: Mapping[str, Any]) -> tuple[Engine, ModelInfo]:
        """For `asked`, Engine's keywords that a line decides; all others are those of the run."""
        options = {**self._options, **asked}
        if self._loaded is not None and model == self._default:
            engine, info = Engine(self._loaded, **options), describe(self._loaded)
        else:
            engine, prediction_type = Engine(model, **options), self._options.get("prediction_type")
            info = describe(model, asked["vae"], prediction_type, hashed=True, text_encoders=asked["text_encoders"])
        return engine, info if engine.controlnets is None else engine.controlnets.fitted(info)

    def drawable(self, settings: Mapping[str, Any]) -> tuple[Engine, Settings]:
        """The engine of a job's settings, and what it shares with all jobs that may be in its batch."""
        engine, info = self.model(settings)
        sources, controls, prompted = _inputs(settings, info)
        return engine, resolve(settings, info, sources, controls=controls, image_prompts=prompted)

    def _prompt(self, asked: Mapping[str, Any]) -> tuple[str, tuple[Adapter, ...]]:
        """(the prompt without its tags, its LoRAs: of `fast`, the line's or the command's, those of tags)."""
        lora = None if asked.get("lora") is None else list(asked["lora"])
        texts = check_prompts(asked["prompt"]), (asked.get("negative_prompt"),)
        (prompt,), _, (adapters,) = take_adapters(*texts, lora, self._lora_dir)
        Prompt.parse(prompt)
        if self._fast is not None:
            check_beside((adapters,))
            adapters = (self._fast(asked.get("model", self._default), asked.get("vae")), *adapters)
        return prompt, adapters

    def _warn(self, lines: Iterable[str]) -> None:
        """Each line once."""
        for line in lines:
            if line not in self._warned:
                self._warned.add(line)
                console.warn(line)

    def _remembered(self, asked: Mapping[str, Any], adapters: tuple[Adapter, ...]) -> Resolved:
        """`_resolved`, once for all lines that ask for the same; images are read each time."""
        if any(asked.get(name) is not None for name in FILES):
            return self._resolved(asked, adapters)
        key = (adapters, *sorted((name, _hashable(value)) for name, value in asked.items()))
        if key not in self._shared:
            if len(self._shared) == REMEMBERED:
                self._shared.pop(next(iter(self._shared)))
            self._shared[key] = self._resolved(asked, adapters)
        return self._shared[key]

    def _resolved(self, asked: Mapping[str, Any], adapters: tuple[Adapter, ...]) -> Resolved:
        """(the settings of a job that its batch may share, with every default of the model; digests of its images)."""
        given = {"model": self._default, **{name: value for name, value in asked.items() if value is not None}}
        if unknown := given.keys() - SETTINGS.keys():
            raise ConfigError("is not supported in prompt files", where=min(unknown), hint="leave it out")
        engine, info = self.model(given)
        if engine.controlnets is not None:
            given = engine.controlnets.with_modes(given)
        sources, controls, prompted = _inputs(given, info)
        fitting = with_few_steps(info, (adapters,)) if adapters else info
        settings = resolve(given, fitting, sources, controls=controls, image_prompts=prompted)
        engine.check_settings(settings)
        self._warn(size_warnings(settings, info))
        of_model: dict[str, Any] = {name: str(given[name]) for name in OF_MODEL if given.get(name, "auto") != "auto"}
        if given.get("text_encoders"):
            of_model["text_encoders"] = list(given["text_encoders"])
        initial: dict[str, Any] = {} if sources is None else {name: given[name] for name in INITIAL if name in given}
        digests = _digests(sources)
        if controls is not None:
            self._warn(control_warnings(controls.each))
            of_model["controlnet"] = [str(name) for name in listed(given["controlnet"])]
            initial["control_image"] = [str(name) for name in listed(given["control_image"])]
            digests["control_image"] = [image.sha256 for image in controls.each[0]]
        if prompted is not None:
            of_model["ip_adapter"] = [str(name) for name in listed(given["ip_adapter"])]
            of_model |= {"image_encoder": str(given["image_encoder"])} if given.get("image_encoder") else {}
            initial |= {name: given[name] for name in ("ip_adapter_image", "ip_adapter_mask") if name in given}
            pairs = [([f.sha256 for f in one.images], [f.sha256 for f in one.masks]) for one in prompted.each[0]]
            digests["ip_adapter_image"] = [list(pair) for pair in pairs]
        return {**of_model, **changed_settings(settings), **initial}, digests


def changed_settings(settings: Settings) -> dict[str, Any]:
    """generate's keywords of resolved settings, without those whose value changes nothing."""
    neutral = {field.name: field.default for field in dataclasses.fields(settings)}
    neutral |= {"guidance": "cfg", "guidance_rescale": 0.0}
    changed = {n: v for n, v in settings.keywords().items() if v is not None and v != neutral.get(n)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def image_request(settings: Mapping[str, Any]) -> ImageRequest:
    """The image of a job's settings."""
    request = {name: settings[name] for name in ("seed", "guidance_scale")}
    negative = settings["negative_prompt"]
    request["prompt"] = Prompt.parse(settings["prompt"])
    request["negative_prompt"] = None if negative is None else Prompt.parse(negative)
    request["adapters"] = adapters_of(settings)
    if "variation_seed" in settings:
        request["variation"] = settings["variation_seed"], settings["variation_strength"]
    if "true_cfg_scale" in settings:
        request["true_cfg_scale"] = settings["true_cfg_scale"]
    sources, controls, prompted = _inputs(settings)
    if sources is not None:
        (request["source"],) = sources.fitted(settings["height"], settings["width"])
    if controls is not None:
        (request["controls"],) = controls.each
    if prompted is not None:
        (request["shown"],) = prompted.each
    return ImageRequest(**request)


def adapters_of(settings: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The LoRAs of a job's settings."""
    return tuple(Adapter(Path(path), *weights) for path, *weights in settings.get("lora", ()))


def _inputs(
    settings: Mapping[str, Any], info: ModelInfo | None = None
) -> tuple[Sources | None, Controls | None, ImagePrompts | None]:
    """The images of a line or a job, which is one image: where it begins, what ControlNets and IP-Adapters look at."""
    controls, prompted = check_controls(settings, 1, 1), check_image_prompts(settings, 1, 1, info)
    return check_sources(settings, 1, 1), controls, prompted


def _variation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The variation's settings, where there is one. Raises ConfigError: its seed is never drawn."""
    if asked.get("variation_strength") and asked.get("variation_seed") in (None, -1):
        raise ConfigError("a variation needs its own seed", where="variation_seed", hint="give a number")
    variations = check_variations(asked, 1, 1)
    return {} if variations is None else dict(zip(("variation_seed", "variation_strength"), variations[0]))


def _digests(sources: Sources | None) -> dict[str, Any]:
    """What stands for the files of sources in a job's key: their pixels."""
    metadata = {} if sources is None else sources.each[0].metadata
    return {name: metadata[digest] for name, digest in DIGESTS.items() if digest in metadata}


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else tuple(value.items()) if isinstance(value, dict) else value


def _once(table: dict, key: tuple, make: Callable[[], Any]) -> Any:
    """What `make` gives for this key, or raises: asked once, and kept in `table`."""
    if key not in table:
        try:
            table[key] = make()
        except LdmError as error:
            table[key] = error
    if isinstance(table[key], LdmError):
        raise table[key]
    return table[key]
