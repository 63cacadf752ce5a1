"""The settings of Pipeline and generate: their names, aliases, ranges and defaults. No weight is read here.

Imports nothing heavy, so that the command line can print the tables in its help.
"""

from __future__ import annotations

import math
import operator
import os
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import require
from ldm.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.guidance import Guidance

STEPS, GUIDANCE, SAMPLER, BATCH, LATENT_SIZE = 25, 6.0, "dpmpp_2m", 8, 64  # where the model says nothing
MAX_STEPS, MAX_GUIDANCE, MAX_SIZE, MAX_PROMPT, MAX_IMAGES = 1000, 1000.0, 8192, 100_000, 100_000

# Words of diffusers, A1111 and kohya -> ours.
ALIASES: dict[str, str] = {
    "num_images_per_prompt": "num_images",
    "n_iter": "num_images",
    "generator": "seed",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "cfg": "guidance_scale",
    "scale": "guidance_scale",
    "neg": "negative_prompt",
    "sampler_name": "sampler",
    "schedule": "spacing",
    "timestep_spacing": "spacing",
    "callback_on_step_end": "callback",
    "init_image": "image",
    "mask": "mask_image",
    "denoising_strength": "strength",
    "W": "width",
    "w": "width",
    "H": "height",
    "h": "height",
    "torch_dtype": "dtype",
    "pretrained_model_name_or_path": "model",
}
# generate's keywords for the fields of ldm.diffusion.guidance.Guidance.
GUIDANCE_WORDS = {"guidance": "kind", "guidance_rescale": "rescale", "guidance_interval": "interval"}
GUIDANCE_WORDS |= {"guidance_sigma_interval": "sigma_interval"}
GUIDANCE_OPTIONS = ("apg_eta", "apg_momentum", "apg_threshold", "pag_scale", "pag_layers", "zero_init_steps")
GUIDANCE_WORDS |= {name: name for name in GUIDANCE_OPTIONS}
DEFAULTS = {"model": "default", "negative_prompt": "", "device": "auto", "dtype": "auto"}  # of Pipeline(...)
# What is known and refused: name -> (values that change nothing, what to tell whoever gives another).
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "image": ((None,), "image-to-image is not supported yet"),
    "mask_image": ((None,), "inpainting is not supported yet"),
    "strength": ((None, 0.8), "strength belongs to image-to-image, which is not supported yet"),
    "clip_skip": ((None, 0), "clip_skip is not supported yet"),
    "timesteps": ((None,), "explicit timesteps are not supported yet; num_inference_steps and spacing choose them"),
    "sigmas": ((None,), "explicit sigmas are not supported yet; num_inference_steps and spacing choose them"),
    "prompt_embeds": ((None,), "embeddings in place of a prompt are not supported"),
    "negative_prompt_embeds": ((None,), "embeddings in place of a prompt are not supported"),
    "cross_attention_kwargs": ((None,), "there are no attention processors to hand settings to"),
    "callback_on_step_end_tensor_inputs": ((None,), "callbacks are given (i, x, x0)"),
    "ip_adapter_image": ((None,), "IP-Adapter is not supported"),
    "controlnet": ((None,), "ControlNet is not supported"),
    "output_type": ((None, "pil"), "the result is always PIL pictures; ldm.images.to_tensor turns them into tensors"),
    "return_dict": ((None, True), "the result is always a sequence of pictures with .seeds and .metadata"),
    "scheduler": ((None,), "say sampler= for the solver and spacing= for its noise levels"),
}


@dataclass(frozen=True)
class Settings:
    """What one call of generate does; None where the model decides (see `resolve`)."""

    num_images: int  # of each prompt
    seeds: tuple[int, ...]  # one for each image, prompt by prompt
    num_inference_steps: int | None
    guidance_scale: float | tuple[float, ...] | None  # of all, or one for each image
    guidance: Guidance  # its scale is right once the model's default is known
    height: int | None  # pixels
    width: int | None
    sampler: str | None
    spacing: str | None  # None: the model's own
    eta: float | None  # of samplers that have one; None: theirs
    batch_size: int  # images that are denoised together; has no influence on the pictures
    latents: torch.Tensor | None  # (images, C, h, w)
    callback: Callable | None

    def resolve(self, model: Any) -> Settings:
        """With every default of `model` filled in. Raises ConfigError where the size or steps do not fit it."""
        from ldm.diffusion import names

        if model.unet.config.in_channels != model.vae.latent_channels:
            raise ConfigError(f"{model.name} is an inpainting model; {UNSUPPORTED['mask_image'][1]}", where="model")
        own = model.info.get("ldm") if isinstance(model.info, Mapping) else None
        own = own if isinstance(own, Mapping) else {}
        sampler, joined = names.resolve(self.sampler or own.get("sampler", SAMPLER))
        side = (model.unet.config.sample_size or LATENT_SIZE) * model.vae.factor
        h, w = self.latents.shape[2:] if self.latents is not None else (None, None)
        given = self.guidance_scale
        scale = _own(own, "guidance_scale", float, GUIDANCE) if given is None else given
        filled = replace(
            self,
            num_inference_steps=self.num_inference_steps or _own(own, "num_inference_steps", int, STEPS),
            guidance_scale=scale,
            guidance=replace(self.guidance, scale=scale),
            sampler=sampler,
            spacing=self.spacing or joined or (None if sampler == "lcm" else own.get("spacing")),  # it has its own
            height=self.height or (h * model.vae.factor if h else side),
            width=self.width or (w * model.vae.factor if w else side),
        )
        names.check(sampler, model.schedule.prediction_type, filled.spacing)
        names.options(sampler, self.eta)
        model.unet.check_levels(self.guidance.pag_layers or ())
        for name in ("height", "width"):
            check_size(getattr(filled, name), name, model.vae.factor)
        if filled.latents is not None:
            c = model.vae.latent_channels
            expected = (len(self.seeds), c, filled.height // model.vae.factor, filled.width // model.vae.factor)
            require(
                tuple(filled.latents.shape) == expected,
                f"this model and size need the shape {expected}, got {tuple(filled.latents.shape)}",
                "latents",
            )
        steps, limit = filled.num_inference_steps, model.schedule.num_train_timesteps
        require(steps <= limit, f"{steps} is more than the {limit} steps of this model", "num_inference_steps")
        return filled


def canonical(given: Mapping[str, Any], words: Mapping[str, Any], other: Sequence[str] = ()) -> dict[str, Any]:
    """`given` under our names; `words` are the caller's own keywords with their values, `other` are known elsewhere.

    Raises ConfigError for an unknown keyword (with the nearest), one thing said twice, and what is not supported.
    """
    settings = dict(words)
    for word, value in given.items():
        name = ALIASES.get(word, word)
        if name in other:
            belongs = "Pipeline(...)" if "num_images" in words else "generate(...)"
            raise ConfigError(f"{word} belongs to {belongs}", where=word)
        if name not in words and name not in UNSUPPORTED:
            raise ConfigError(f"unknown setting {word!r}", todo=nearest(word, [*words, *ALIASES]))
        if name in words and settings[name] not in (None, DEFAULTS.get(name), value):
            raise ConfigError(f"{word} and {name} are the same setting, and both are given", where=word)
        settings[name] = adapt_callback(value) if word == "callback_on_step_end" else value
    for name in [name for name in settings if name in UNSUPPORTED]:
        neutral, sentence = UNSUPPORTED[name]
        value = settings.pop(name)
        if not any(value is item or (type(value) in (int, float, str) and value == item) for item in neutral):
            raise ConfigError(sentence, where=name)
    return settings


def adapt_callback(function: Callable) -> Callable:
    """diffusers' callback_on_step_end(pipe, step, timestep, kwargs) as ours; it may look, not change."""

    def callback(i, x, x0):
        answer = function(None, i, None, {"latents": x})
        if isinstance(answer, Mapping) and answer.get("latents", x) is not x:
            raise ConfigError("the callback must not change latents", where="callback_on_step_end")

    return callback if callable(function) else function


def check_settings(given: Mapping[str, Any], prompts: int, folder: Path | None = None) -> Settings:
    """Checks generate's keywords (under our names) for `prompts` prompts; `folder` is where configs can be read.

    Raises ConfigError naming the setting and the values that would do.
    """
    num_images, seeds = check_seeds(given["num_images"], given["seed"], prompts)
    steps, (sampler, spacing) = given["num_inference_steps"], check_sampler(given["sampler"], given["spacing"])
    factor = vae_factor(folder)
    scale = None if given["guidance_scale"] is None else check_guidance(given["guidance_scale"], len(seeds))
    batch_size = given.get("batch_size")
    return Settings(
        num_images=num_images,
        seeds=seeds,
        num_inference_steps=None if steps is None else check_int(steps, "num_inference_steps", 1, MAX_STEPS),
        guidance_scale=scale,
        guidance=make_guidance(GUIDANCE if scale is None else scale, given),
        height=None if given["height"] is None else check_size(given["height"], "height", factor),
        width=None if given["width"] is None else check_size(given["width"], "width", factor),
        sampler=sampler,
        spacing=spacing,
        eta=check_eta(given["eta"], sampler),
        batch_size=BATCH if batch_size is None else check_int(batch_size, "batch_size", 1, MAX_IMAGES),
        latents=None if given["latents"] is None else check_latents(given["latents"], len(seeds)),
        callback=check_callback(given["callback"]),
    )


def check_prompts(value: Any, where: str = "prompt") -> tuple[str, ...]:
    """A text or a list of texts as a tuple. Raises ConfigError for None, an empty list, control characters, length."""
    if not isinstance(value, (str, list, tuple)):
        raise ConfigError(f"expected a text or a list of texts, got {value!r:.80}", where=where)
    texts = (value,) if isinstance(value, str) else tuple(value)
    require(len(texts) > 0, "the list is empty", where)
    for i, text in enumerate(texts):
        place = where if isinstance(value, str) else f"{where}[{i}]"
        require(isinstance(text, str), f"expected a text, got {text!r:.80}", place)
        require(len(text) <= MAX_PROMPT, f"{len(text):,} characters are more than {MAX_PROMPT:,}", place)
        for position, character in enumerate(text):
            if character < " " or character > "~":
                control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
                require(not control, f"control character U+{ord(character):04X} at position {position}", place)
    return texts


def check_negative(value: Any, prompts: int) -> tuple[str | None, ...]:
    """One negative prompt for each prompt; None stands for zeros with XL and for "" elsewhere."""
    if value is None:
        return (None,) * prompts
    texts = check_prompts(value, "negative_prompt")
    if isinstance(value, str):
        return texts * prompts
    require(len(texts) == prompts, f"{len(texts)} texts for {prompts} prompts", "negative_prompt")
    return texts


def check_int(value: Any, where: str, least: int, most: int) -> int:
    """`value` as an int within the range; whole floats are taken, truth values are not."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise ConfigError(f"expected a whole number, got {value!r:.80}", where=where)
    require(least <= number <= most, f"{number} is outside {least} to {most}", where)
    return number


def check_guidance(value: Any, images: int | None = None) -> float | tuple[float, ...]:
    """A finite guidance scale from 0 up, 1 and below being without guidance; or a list of them, one for each image."""
    where = "guidance_scale"
    if images is not None and isinstance(value, (list, tuple)):
        require(len(value) == images, f"{len(value)} scales for {images} images", where)
        return tuple(check_guidance(one) for one in value)
    number = None if isinstance(value, (bool, str, bytes)) else value
    try:
        number = float(number)
    except (TypeError, ValueError):
        raise ConfigError(f"expected a number, got {value!r:.80}", where=where) from None
    require(math.isfinite(number), f"{number} is not a finite number", where)
    require(0 <= number <= MAX_GUIDANCE, f"{number:g} is outside 0 to {MAX_GUIDANCE:g}", where)
    return number


def make_guidance(scale: float | tuple[float, ...], given: Mapping[str, Any]) -> Guidance:
    """The kind of guidance and its options, from generate's keywords. Raises ConfigError naming the keyword."""
    from ldm.diffusion.guidance import Guidance

    words = {name: given[word] for word, name in GUIDANCE_WORDS.items() if given.get(word) is not None}
    return Guidance(scale=scale, **words)


def check_size(value: Any, where: str, factor: int | None) -> int:
    """A number of pixels that the VAE's factor (where known) divides. Raises ConfigError naming the nearest two."""
    number = check_int(value, where, 1, MAX_SIZE)
    if factor and number % factor:
        below, above = number // factor * factor, -(-number // factor) * factor
        near = f"{below} or {above}" if below else str(above)
        raise ConfigError(f"{number} is not a multiple of {factor}", where=where, todo=f"use {near}")
    return number


def _own(card: Mapping[str, Any], name: str, kind: Callable, default: Any) -> Any:
    """A setting from the model's card, as a number above 0. Raises ConfigError where it is none."""
    value = card.get(name, default)
    try:
        number = kind(value)
        good = 0 < number <= 1000
    except (TypeError, ValueError, OverflowError):
        good = False
    if not good:
        todo = f"mend the card (README.md), or give {name} yourself"
        raise ConfigError(f"the model's card says {value!r:.80}", where=name, todo=todo)
    return number


def check_sampler(sampler: Any, spacing: Any) -> tuple[str | None, str | None]:
    """Our names of a sampler and a spacing, from anybody's; a joined label ("DPM++ 2M Karras") gives both."""
    from ldm.diffusion import names

    name, joined = (None, None) if sampler is None else names.resolve(sampler)
    spacing = None if spacing is None else names.resolve_spacing(spacing)
    if joined and spacing and joined != spacing:
        raise ConfigError(f"{sampler!r:.80} says {joined}, and {spacing} is given too", where="spacing")
    return name, spacing or joined


def check_eta(value: Any, sampler: str | None) -> float | None:
    """A number from 0 to 1 for a sampler that takes one; None: the sampler's own."""
    from ldm.diffusion import names

    names.options(sampler or "ddim", value)  # of a sampler that is not known yet: the range alone
    return None if value is None else float(value)


def check_seeds(num_images: Any, seed: Any, prompts: int) -> tuple[int, tuple[int, ...]]:
    """(images of each prompt, one seed for each image): image k of every prompt gets seed + k, a list is as it is.

    None and -1 draw below 2**32. A CPU torch.Generator that was not used yet stands for its seed.
    """
    if num_images is not None:
        num_images = check_int(num_images, "num_images", 1, MAX_IMAGES)
    several = isinstance(seed, Sequence) and not isinstance(seed, (str, bytes))
    if not several:
        num_images = num_images or 1
        first = _seed(seed, spare=num_images)
        return num_images, tuple(first + k for k in range(num_images)) * prompts
    if num_images is None and len(seed) % prompts == 0:
        num_images = len(seed) // prompts
    expected = (num_images or 1) * prompts
    require(len(seed) == expected and expected > 0, f"{len(seed)} seeds for {expected} images", "seed")
    return num_images, tuple(_seed(s, where=f"seed[{i}]") for i, s in enumerate(seed))


def _seed(value: Any, where: str = "seed", spare: int = 1) -> int:
    if type(value).__name__ == "Generator" and hasattr(value, "initial_seed"):
        value = _generator_seed(value, where)
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value == -1):
        return secrets.randbelow(2**32 - spare)
    return check_int(value, where, 0, 2**63 - spare)


def _generator_seed(generator: torch.Generator, where: str) -> int:
    import torch

    seed = generator.initial_seed()
    require(generator.device.type == "cpu", "noise is drawn on the CPU; give a CPU generator or a number", where)
    fresh = torch.Generator("cpu").manual_seed(seed).get_state()
    require(torch.equal(fresh, generator.get_state()), "this generator was used before; give a fresh one", where)
    return seed


def check_latents(value: Any, images: int) -> torch.Tensor:
    """Starting noise (images, C, h, w), as far as it can be checked without the model."""
    import torch

    require(isinstance(value, torch.Tensor), f"expected a tensor, got {type(value).__name__}", "latents")
    shape = tuple(value.shape)
    require(
        value.ndim == 4 and len(value) == images and value.is_floating_point(),
        f"expected floating-point noise (images, channels, height, width) for {images} images, got {shape}",
        "latents",
    )
    require(bool(torch.isfinite(value).all()), "holds NaN or infinity", "latents")
    return value


def check_callback(value: Any) -> Callable | None:
    """A function (i, x, x0), or None."""
    require(value is None or callable(value), f"expected a function (i, x, x0), got {value!r:.80}", "callback")
    return value


def check_steps(settings: Settings, folder: str | os.PathLike | None) -> None:
    """Raise ConfigError where the model's own schedule cannot take these steps and spacing; reads no weight."""
    from ldm.checkpoint import settings_of
    from ldm.diffusion import names
    from ldm.diffusion.schedule import Schedule

    config = settings_of(folder and Path(folder)).get("scheduler")
    if config is None:
        return  # loading the model says what is wrong with it
    schedule = Schedule.from_diffusers(dict(config))
    sampler = settings.sampler or SAMPLER
    names.check(sampler, schedule.prediction_type, settings.spacing)
    schedule.sigmas(settings.num_inference_steps or 1, sampler, settings.spacing)


def vae_factor(folder: str | os.PathLike | None) -> int | None:
    """Pixels per latent, by the settings of a model or a VAE (folder or file); None where unknown."""
    from ldm.checkpoint import settings_of

    try:
        return 2 ** (len(settings_of(folder and Path(folder))["vae"]["block_out_channels"]) - 1)
    except (KeyError, TypeError):
        return None
