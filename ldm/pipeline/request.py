"""One call of generate: its keywords, checked and completed from what is known of the model before a weight is read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.checkpoint.describe import ModelInfo
from ldm.config import require
from ldm.diffusion import names
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.guidance.guided import zero_init
from ldm.diffusion.inpaint import img2img_sigmas
from ldm.diffusion.spacings import DISTILLED
from ldm.errors import ConfigError
from ldm.nn.tiling import AUTO, TILE
from ldm.pipeline import checks
from ldm.pipeline.adapters import Adapter
from ldm.pipeline.control import ControlImage, Controls, ControlSettings, check_controls
from ldm.pipeline.ip_adapter import SCALE, ImagePrompts, Shown, Spec, check_image_prompts
from ldm.pipeline.keywords import (
    BATCH,
    CONTROL_WORDS,
    GUIDANCE,
    GUIDANCE_WORDS,
    HIRES_STRENGTH,
    MAX_IMAGES,
    MAX_SIZE,
    SAMPLER,
    SHOWN_WORDS,
    STEPS,
)
from ldm.pipeline.sources import Source, Sources, check_area, check_sources
from ldm.prompts import Prompt

EMPTY = Prompt.parse("")
SIDES = ("height", "width")
LEAST_AREA = 0.75  # of the pixels that a U-Net was trained on: with fewer its shapes suffer (96x96 instead of 128x128)


@dataclass(frozen=True)
class Run:
    """One sampling run: an image's first, or the second, larger one of hires-fix."""

    height: int  # pixels
    width: int
    sigmas: torch.Tensor  # (n + 1,) fp32 on the CPU, descending: the noise levels that are visited

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def area(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Settings:
    """How images are drawn that may be in one batch, with all that the model decides; made by `resolve`."""

    num_inference_steps: int
    guidance: Guidance  # without its scale, which each image has for itself
    height: int  # pixels
    width: int
    sampler: str
    spacing: str | None = None  # None: that of the model's schedule
    timesteps: tuple[float, ...] | None = None  # in place of a spacing's
    sigmas: tuple[float, ...] | None = None  # likewise
    eta: float | None = None  # of samplers that have one; None: theirs
    true_cfg_scale: float | None = None  # of models whose guidance_scale is an input of the network, or is not used
    clip_skip: int = 0  # layers of the text encoder that are left out, as diffusers counts
    emphasis: str = "original"  # or no_norm
    strength: float | None = None  # how much of the steps is run on an initial image; None: there is none
    hires_scale: float | None = None  # draw, make so many times larger, draw on; None: draw once
    hires_steps: int | None = None  # of the second run, of which hires_strength is run; None: as many as of the first
    hires_strength: float | None = None
    step_cache: int | None = None  # of a U-Net: deep features are computed in every n-th step alone; None: in each
    control: ControlSettings | None = None  # how ControlNets act; None: there are none
    shown: tuple[Spec, ...] | None = None  # how much each IP-Adapter does; None: there are none
    vae_tiling: bool | None = None  # whether the VAE works in tiles; None: where the image is large
    runs: tuple[Run, ...] = field(default=(), compare=False)  # one, with hires-fix two

    def keywords(self) -> dict[str, Any]:
        """generate's keywords in the order of metadata; of guidance's options those that its kind has."""
        found: dict[str, Any] = {}
        for one in dataclasses.fields(self):
            if one.name == "guidance":
                options = {word: getattr(self.guidance, name) for word, name in GUIDANCE_WORDS.items()}
                found |= {word: value for word, value in options.items() if value is not None}
            elif one.name in ("true_cfg_scale", "step_cache") and getattr(self, one.name) is None:
                continue
            elif one.name == "control":
                found |= {} if self.control is None else self.control.keywords()
            elif one.name == "shown":
                found |= {} if self.shown is None else {SCALE: self.shown}
            elif one.name != "runs":
                found[one.name] = getattr(self, one.name)
        return found

    def tile(self, factor: int, height: int, width: int) -> int | None:
        """The side in latents of the tiles that an image of this size goes through the VAE in; None: all at once."""
        large = height * width > (AUTO * factor) ** 2
        return TILE if (large if self.vae_tiling is None else self.vae_tiling) else None


def resolve(
    given: Mapping[str, Any],
    info: ModelInfo,
    sources: Sources | None = None,
    latents: torch.Tensor | None = None,
    controls: Controls | None = None,
    image_prompts: ImagePrompts | None = None,
) -> Settings:
    """generate's keywords (under our names; absent ones are None) with every default of the model filled in.

    `sources`, `latents` or `controls` decide the size where nothing else does. Raises ConfigError for a value that
    cannot be, and where size, steps, latents, sources, guidance or text settings do not fit the model.
    """
    if info.unet.in_channels != info.latent_channels and (sources is None or not sources.masked):
        raise ConfigError(f"{info.name} is an inpainting model", where="model", hint="give image and mask_image")
    sampler = spacing = None
    if checks.is_given(given, "sampler", "spacing"):
        sampler, spacing = checks.check_sampler(given)
    found = checks.check_settings(given)
    sampler, joined = names.resolve(sampler or info.card.get("sampler", SAMPLER))
    if not found.get("timesteps") and not found.get("sigmas"):
        spacing = spacing or joined or (None if sampler in DISTILLED else info.card.get("spacing"))  # they have theirs
        xl = info.transformer is None and info.unet.pooled_width is not None
        spacing = "ays_xl" if spacing == "ays" and xl else spacing
    height, width = _size(given, info, sources, latents, controls)
    if info.transformer or info.unet.embeds_guidance or given.get("true_cfg_scale") is not None:
        found["true_cfg_scale"] = _true_cfg_scale(given, info)
    if found.get("num_inference_steps") is None:
        found["num_inference_steps"] = card_steps(info)
    if given.get("eta") is not None:
        found["eta"] = checks.check_eta(given["eta"], sampler)
    elif "eta" in info.card and sampler == info.card.get("sampler"):
        found["eta"] = checks.check_eta(info.card["eta"], sampler)
    guidance = checks.make_guidance(given)
    if found.get("hires_scale") and found["hires_strength"] is None:
        found["hires_strength"] = _hires_strength(info, found["hires_steps"] or found["num_inference_steps"])
    found["control"] = None if controls is None else controls.settings
    found["shown"] = None if image_prompts is None else image_prompts.scales
    settings = Settings(guidance=guidance, height=height, width=width, sampler=sampler, spacing=spacing, **found)
    _check_fit(settings, info)
    return dataclasses.replace(settings, runs=_runs(settings, info))


def _true_cfg_scale(given: Mapping[str, Any], info: ModelInfo) -> float | None:
    """The scale of classifier-free guidance of FLUX and LCM's U-Nets (1: none, as usual); None for other models."""
    value = given.get("true_cfg_scale")
    if info.unet.embeds_guidance or (info.transformer and info.transformer.is_flux):
        return 1.0 if value is None else checks.check_guidance(value, "true_cfg_scale")
    what = "is for FLUX and others whose guidance_scale is an input of the network or not used"
    require(value is None, what, "true_cfg_scale")
    return None


def _size(
    given: Mapping[str, Any],
    info: ModelInfo,
    sources: Sources | None,
    latents: torch.Tensor | None,
    controls: Controls | None,
) -> tuple[int, int]:
    """(height, width): the given ones, or those of initial images, latents, control images, or the model's training."""
    asked = [n if n is None else checks.check_size(n, x, info.multiple) for x, n in ((x, given.get(x)) for x in SIDES)]
    side = info.usual_side
    if sources is not None:
        height, width = sources.size(info.multiple, *asked)
        if None in asked:
            check_area(height, width, side, info.multiple)
    elif controls is not None and latents is None and None in asked:
        height, width = controls.size(side, info.multiple, *asked)
    else:
        trained = (side, side) if latents is None else [m * info.factor for m in latents.shape[2:]]
        height, width = (n or checks.check_size(m, x, 1) for n, m, x in zip(asked, trained, SIDES))
    if latents is not None:
        _check_latents(latents, info, height, width)
    if info.transformer:
        info.transformer.check_size(height // info.factor, width // info.factor)
    return height, width


def _check_latents(latents: torch.Tensor, info: ModelInfo, height: int, width: int) -> None:
    """Raise ConfigError where given latents do not have this size, or the model cannot."""
    expected = (len(latents), info.latent_channels, height // info.factor, width // info.factor)
    shape = tuple(latents.shape)
    require(shape == expected, f"this model and size need the shape {expected}, got {shape}", "latents")
    for n, word in zip((height, width), SIDES):
        checks.check_size(n, word, info.multiple)


def _check_fit(s: Settings, info: ModelInfo) -> None:
    """Raise ConfigError where sampler, guidance or text settings do not go with the model."""
    names.check(s.sampler, info.schedule.prediction_type, s.spacing)
    if s.guidance.zero_init_steps:
        zero_init(s.guidance, info.schedule)
    if s.guidance.pag_layers:
        info.unet.check_attention_layers(s.guidance.pag_layers)
    require(not (s.step_cache and info.transformer), "is for U-Nets, and this is a flow transformer", "step_cache")
    limit = info.schedule.num_train_timesteps
    for name, steps in (("num_inference_steps", s.num_inference_steps), ("hires_steps", s.hires_steps or 0)):
        require(steps <= limit, f"{steps} steps are more than the {limit} of this model", name)
    if s.clip_skip or len(info.clip_layers) > 1:
        _check_clip_skip(s.clip_skip, info.clip_layers)


def _check_clip_skip(clip_skip: int, encoders: tuple[int, ...]) -> None:
    if clip_skip and not encoders:
        what = f"clip_skip {clip_skip} is impossible: the text encoder is T5, not CLIP"
        raise ConfigError(what, where="clip_skip")
    for layers in encoders:  # XL takes the last layer but one by itself
        layers -= len(encoders) > 1
        what = f"clip_skip {clip_skip} is impossible: the text encoder has {layers} layers"
        require(clip_skip < layers, what, "clip_skip")


def _runs(s: Settings, info: ModelInfo) -> tuple[Run, ...]:
    """The sampling runs with their noise levels. Raises ConfigError where these cannot be."""
    sigmas = _sigmas(s, info, s.num_inference_steps, info.tokens(s.height, s.width))
    first = Run(s.height, s.width, sigmas if s.strength is None else img2img_sigmas(sigmas, s.strength))
    return (first,) if s.hires_scale is None else (first, _hires_run(s, s.hires_scale, info))


def _hires_run(s: Settings, scale: float, info: ModelInfo) -> Run:
    height, width = (int(side * scale) // info.multiple * info.multiple for side in (s.height, s.width))
    require(max(height, width) <= MAX_SIZE, f"more than {MAX_SIZE} a side", "hires_scale")
    if info.transformer:
        info.transformer.check_size(height // info.factor, width // info.factor)
    assert s.hires_strength is not None  # `resolve` has filled it in
    sigmas = _sigmas(s, info, s.hires_steps or s.num_inference_steps, info.tokens(height, width))
    return Run(height, width, img2img_sigmas(sigmas, s.hires_strength, "hires_strength"))


def _sigmas(settings: Settings, info: ModelInfo, steps: int, tokens: int | None) -> torch.Tensor:
    if settings.timesteps or settings.sigmas:
        return info.schedule.given(settings.sampler, settings.timesteps, settings.sigmas)
    return info.schedule.sigmas(steps, settings.sampler, settings.spacing, tokens)


def size_warnings(settings: Settings, info: ModelInfo) -> list[str]:
    """Lines about sizes that the model was not trained on, where they are likely to spoil the image.

    The hires_strength of a model's card says how much of the steps may be run at a larger size.
    """
    side = info.side
    kept = card_hires_strength(info) if "hires_strength" in info.card else None
    trained, found = f"the {side}x{side} that the model was trained on", []
    (first, *second), strength = settings.runs, settings.strength or 1.0
    if side and first.area > side**2 and (kept is None or strength > kept):
        hint = "" if settings.strength else "; try hires_scale"
        hint = f"; a strength up to {kept:g} keeps shapes" if kept is not None and strength < 1 else hint
        found.append(f"{first.size} is more than {trained}: it may repeat itself{hint}")
    if first.area < LEAST_AREA * side**2 and not info.transformer:
        found.append(f"{first.size} is less than {trained}: shapes may fall apart; draw it larger and shrink the image")
    if second and kept is not None and (settings.hires_strength or 0) > kept and second[0].area > side**2:
        what = f"{second[0].size} is more than {trained}"
        found.append(f"{what}: shapes may fall apart; a hires_strength up to {kept:g} keeps them")
    return found


def check_scales(scales: Sequence[float], info: ModelInfo) -> None:
    """Raise ConfigError for a guidance_scale above 1 with a FLUX that has no input for it."""
    unused = info.transformer and info.transformer.is_flux and not info.transformer.guidance_embeds
    if unused and max(scales) > 1:
        hint = "leave it out, or give true_cfg_scale"
        raise ConfigError("this FLUX model takes no scale of the guidance", where="guidance_scale", hint=hint)


def card_scale(info: ModelInfo) -> float:
    """The guidance scale that a model's card asks for, or 6. Raises ConfigError where it says no number."""
    return info.card_number("guidance_scale", float, GUIDANCE)


def card_steps(info: ModelInfo) -> int:
    """The number of steps that a model's card asks for, or 25. Raises ConfigError where it says no number."""
    return info.card_number("num_inference_steps", int, STEPS)


def card_hires_strength(info: ModelInfo) -> float:
    """How much of its steps a larger second run is run, as the model's card says, or 0.7. Raises ConfigError."""
    return info.card_number("hires_strength", float, HIRES_STRENGTH, most=1)


def _hires_strength(info: ModelInfo, steps: int) -> float:
    """The card's, or what is left of so few steps: one."""
    return max(card_hires_strength(info), math.ceil(1000 / steps) / 1000)


@dataclass(frozen=True)
class Request:
    """One call of generate: its settings, and what images have of their own."""

    settings: Settings
    num_images: int  # of each prompt
    seeds: tuple[int, ...]  # one for each image, prompt by prompt
    guidance_scales: tuple[float, ...]  # likewise
    latents: torch.Tensor | None  # (images, C, h, w)
    variations: tuple[tuple[int, float], ...] | None  # (seed, strength) of each image
    sources: Sources | None  # the initial images
    controls: tuple[tuple[ControlImage, ...], ...] | None  # of each image, those of all ControlNets
    shown: tuple[tuple[Shown, ...], ...] | None  # of each image, what each IP-Adapter shows
    batch_size: int  # images that are denoised together; has no influence on the images
    callback: Callable | None
    strict: bool  # whether what would be a warning about a prompt is an error


def check_request(given: Mapping[str, Any], prompts: int, info: ModelInfo) -> Request:
    """generate's keywords (under our names) for `prompts` prompts, checked and resolved.

    Raises ConfigError naming the setting and the values that would do.
    """
    num_images, seeds = checks.check_seeds(given["num_images"], given["seed"], prompts)
    variations = latents = sources = controls = image_prompts = callback = None
    if checks.is_given(given, "variation_seed", "variation_strength"):
        variations = checks.check_variations(given, num_images, prompts)
    if variations and not isinstance(given["seed"], Sequence):
        seeds = (seeds[0],) * len(seeds)  # as in A1111: the variation's seed counts up instead
    scale, batch_size = given["guidance_scale"], given["batch_size"]
    scales = (card_scale(info),) * len(seeds) if scale is None else checks.check_guidances(scale, len(seeds))
    check_scales(scales, info)
    if checks.is_given(given, "latents"):
        latents = checks.check_latents(given["latents"], len(seeds))
    if checks.is_given(given, "image", "mask_image", "outpaint"):
        sources = check_sources(given, prompts, num_images)
    if checks.is_given(given, "controlnet", *CONTROL_WORDS[:-1]) or given.get("guess_mode"):
        controls = check_controls(given, prompts, num_images)
    if checks.is_given(given, "ip_adapter", *SHOWN_WORDS):
        image_prompts = check_image_prompts(given, prompts, num_images, info)
    settings = resolve(given, info, sources, latents, controls, image_prompts)
    batch_size = BATCH if batch_size is None else checks.check_int(batch_size, "batch_size", 1, MAX_IMAGES)
    if checks.is_given(given, "callback"):
        callback = checks.check_callback(given["callback"])
    strict = checks.check_bool(given["strict"], "strict")
    shown = None if image_prompts is None else image_prompts.each
    images = (latents, variations, sources, None if controls is None else controls.each, shown)
    return Request(settings, num_images, seeds, scales, *images, batch_size, callback, strict)


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw: its bits are the same whatever is drawn beside it."""

    prompt: Prompt  # without its LoRA tags
    negative_prompt: Prompt | None  # None: zeros with XL, "" elsewhere
    seed: int
    guidance_scale: float
    adapters: tuple[Adapter, ...] = ()
    latents: torch.Tensor | None = None  # (C, h, w): unit noise in place of the seed's
    variation: tuple[int, float] | None = None  # (another seed, how far its noise is mixed in, 0 to 1)
    source: Source | None = None  # the initial image, in the size that is drawn
    true_cfg_scale: float | None = None  # the settings': in place of guidance_scale for CFG
    controls: tuple[ControlImage, ...] = ()  # those of all ControlNets
    shown: tuple[Shown, ...] = ()  # one for each IP-Adapter

    @property
    def cfg_scale(self) -> float:
        """The scale of classifier-free guidance."""
        return self.guidance_scale if self.true_cfg_scale is None else self.true_cfg_scale

    @property
    def prompts(self) -> tuple[Prompt, Prompt | None]:
        """What is encoded: the prompt, and the negative one where there is guidance."""
        return self.prompt, self.negative_prompt if self.cfg_scale > 1 else EMPTY

    @property
    def begins_at_noise(self) -> bool:
        """Whether the noise of its seed and its prompts are all that it is made of."""
        given = self.latents, self.variation, self.source
        return all(one is None for one in given) and not self.controls and not self.shown

    @property
    def form(self) -> tuple[Any, ...]:
        """Whether it begins at an initial image, whether that has a mask, and how many images and masks each IP-Adapter
        shows: equal for all of a batch."""
        counts = [(len(one.images), len(one.masks)) for one in self.shown]
        return self.source is not None, self.source is not None and self.source.mask is not None, *counts

    def renewals(self, settings: Settings) -> tuple[Any, ...]:
        """What a step cache is renewed by: whether there is guidance, and the steps at which texts change. () without a
        step cache. Equal for all of a batch."""
        if not settings.step_cache:
            return ()
        texts = [(run.steps, prompt) for run in settings.runs for prompt in self.prompts if prompt is not None]
        return self.cfg_scale > 1, *(tuple(step for step, _ in prompt.at_steps(n)) for n, prompt in texts)
