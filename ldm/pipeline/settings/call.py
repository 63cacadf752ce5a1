"""What one call of generate was asked, checked before any weight is read, and completed once the model is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import require
from ldm.errors import ConfigError
from ldm.pipeline.keywords import BATCH, GUIDANCE, LATENT_SIZE, MAX_IMAGES, MAX_SIZE, MAX_STEPS, SAMPLER, STEPS
from ldm.pipeline.settings.checks import (
    check_bool,
    check_callback,
    check_emphasis,
    check_eta,
    check_guidance,
    check_hires,
    check_int,
    check_latents,
    check_levels,
    check_sampler,
    check_seeds,
    check_size,
    check_strength,
    check_tiling,
    check_variations,
    make_guidance,
)
from ldm.pipeline.settings.sources import Sources, check_sources

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.guidance import Guidance
    from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn that may be in one batch; None where the model decides (see `resolve`).

    Records tell them in this order.
    """

    num_inference_steps: int | None
    guidance: Guidance  # but for its scale, which is each picture's own
    height: int | None  # pixels
    width: int | None
    sampler: str | None
    spacing: str | None  # None: the model's own
    timesteps: tuple[float, ...] | None = None  # in place of a spacing's
    sigmas: tuple[float, ...] | None = None  # likewise
    eta: float | None = None  # of samplers that have one; None: theirs
    clip_skip: int = 0  # layers of the text encoder that are left out, as diffusers counts
    emphasis: str = "original"  # or no_norm (ldm.nn.text.encode_weighted)
    strength: float | None = None  # how much of the steps is run on a given picture; None: there is none
    hires_scale: float | None = None  # draw, make so many times larger, draw on; None: draw once
    hires_steps: int | None = None  # of the second run, of which hires_strength is run; None: as many as of the first
    hires_strength: float | None = None
    vae_tiling: bool | None = None  # whether the VAE works in tiles; None: where the picture is large

    def resolve(self, model: Any, latents: torch.Tensor | None = None, sources: Sources | None = None) -> Settings:
        """With every default of `model` filled in; `sources` or `latents` decide the size where nothing else does.

        Raises ConfigError where size, steps, latents or sources do not fit the model.
        """
        from ldm.diffusion import names
        from ldm.diffusion.guidance.guided import zero_init

        if model.unet.config.in_channels != model.vae.latent_channels and (sources is None or not sources.masked):
            todo = "give image and mask_image"
            raise ConfigError(f"{model.name} is an inpainting model", where="model", todo=todo)
        own = card_settings(model)
        sampler, joined = names.resolve(self.sampler or own.get("sampler", SAMPLER))
        side = (model.unet.config.sample_size or LATENT_SIZE) * model.vae.factor
        h, w = (n * model.vae.factor for n in latents.shape[2:]) if latents is not None else (side, side)
        h, w = (h, w) if sources is None else sources.size(model.vae.factor, self.height, self.width)
        filled = replace(
            self,
            num_inference_steps=self.num_inference_steps or _own(own, "num_inference_steps", int, STEPS),
            sampler=sampler,
            spacing=None if self.levels else self._spacing(sampler, joined, own, model),
            height=self.height or h,
            width=self.width or w,
        )
        names.check(sampler, model.schedule.prediction_type, filled.spacing)
        names.options(sampler, self.eta)
        zero_init(self.guidance, model.schedule)
        model.unet.check_levels(self.guidance.pag_layers or ())
        for name in ("height", "width"):
            check_size(getattr(filled, name), name, model.vae.factor)
        if latents is not None:
            check_latents_of(model, latents, filled)
        steps, limit = filled.num_inference_steps, model.schedule.num_train_timesteps
        require(steps <= limit, f"{steps} is more than the {limit} steps of this model", "num_inference_steps")
        filled.noise_levels(model.schedule)
        _ = filled.runs  # raises where a strength leaves no step
        if filled.hires_scale is not None:
            second = filled.second(model.vae.factor)
            require(max(second.height, second.width) <= MAX_SIZE, f"more than {MAX_SIZE} a side", "hires_scale")
            require(second.num_inference_steps <= limit, f"more than the {limit} steps of this model", "hires_steps")
            second.noise_levels(model.schedule)
        return filled

    def _spacing(self, sampler: str, joined: str | None, own: Mapping[str, Any], model: Any) -> str | None:
        spacing = self.spacing or joined or (None if sampler == "lcm" else own.get("spacing"))  # lcm has its own
        xl = model.unet.config.addition_embed_type == "text_time"
        return "ays_xl" if spacing == "ays" and xl else spacing

    @property
    def runs(self) -> tuple[int, ...]:
        """How many steps each sampling run of a picture has: one run, with hires-fix two.

        Raises ConfigError where a strength leaves no step.
        """
        from ldm.diffusion.inpaint import steps_left

        n = self.num_inference_steps
        first = n if self.strength is None else steps_left(n, self.strength)
        if self.hires_scale is None:
            return (first,)
        return first, steps_left(self.hires_steps or n, self.hires_strength, "hires_strength")

    def second(self, factor: int) -> Settings:
        """Of hires-fix's second run: larger, in multiples of `factor` rounded down, from a picture."""
        height, width = (int(side * self.hires_scale) // factor * factor for side in (self.height, self.width))
        steps = self.hires_steps or self.num_inference_steps
        own = {"height": height, "width": width, "num_inference_steps": steps, "strength": self.hires_strength}
        return replace(self, **own, hires_scale=None)

    @property
    def levels(self) -> tuple[float, ...] | None:
        """The timesteps or sigmas that were given in place of a spacing's."""
        return self.timesteps or self.sigmas

    def noise_levels(self, schedule: Schedule) -> torch.Tensor:
        """The sigmas that are visited, (n + 1,) fp32, descending. Raises ConfigError where they cannot be."""
        if self.levels:
            return schedule.given(self.sampler or SAMPLER, self.timesteps, self.sigmas)
        return schedule.sigmas(self.num_inference_steps or 1, self.sampler or SAMPLER, self.spacing)


@dataclass(frozen=True)
class Request:
    """One call of generate: its settings, and what pictures have of their own."""

    settings: Settings
    num_images: int  # of each prompt
    seeds: tuple[int, ...]  # one for each image, prompt by prompt
    guidance_scale: float | tuple[float, ...] | None  # of all, or one for each image; None: the model's
    latents: torch.Tensor | None  # (images, C, h, w)
    variations: tuple[tuple[int, float], ...] | None  # (seed, strength) of each image
    sources: Sources | None  # the pictures that they begin at
    batch_size: int  # images that are denoised together; has no influence on the pictures
    callback: Callable | None
    strict: bool  # whether what would be a warning about a prompt is an error


def check_call(given: Mapping[str, Any], prompts: int, folder: Path | None = None) -> Request:
    """Checks generate's keywords (under our names) for `prompts` prompts; `folder` is where configs can be read.

    Raises ConfigError naming the setting and the values that would do.
    """
    num_images, seeds = check_seeds(given["num_images"], given["seed"], prompts)
    variations = check_variations(given, num_images, prompts)
    if variations and not isinstance(given["seed"], Sequence):
        seeds = (seeds[0],) * len(seeds)  # as in A1111: the variation's seed counts up instead
    scale = None if given["guidance_scale"] is None else check_guidance(given["guidance_scale"], len(seeds))
    batch_size = given.get("batch_size")
    return Request(
        settings=_check_settings(given, GUIDANCE if scale is None else scale, vae_factor(folder)),
        num_images=num_images,
        seeds=seeds,
        guidance_scale=scale,
        latents=None if given["latents"] is None else check_latents(given["latents"], len(seeds)),
        variations=variations,
        sources=check_sources(given, prompts, num_images),
        batch_size=BATCH if batch_size is None else check_int(batch_size, "batch_size", 1, MAX_IMAGES),
        callback=check_callback(given["callback"]),
        strict=check_bool(given["strict"], "strict"),
    )


def _check_settings(given: Mapping[str, Any], scale: float | Sequence[float], factor: int | None) -> Settings:
    steps, (sampler, spacing) = given["num_inference_steps"], check_sampler(given["sampler"], given["spacing"])
    steps = None if steps is None else check_int(steps, "num_inference_steps", 1, MAX_STEPS)
    timesteps, steps = check_levels(given["timesteps"], "timesteps", spacing, steps)
    require(timesteps is None or given["sigmas"] is None, "give either timesteps or sigmas", "timesteps")
    sigmas, steps = check_levels(given["sigmas"], "sigmas", spacing, steps)
    return Settings(
        num_inference_steps=steps,
        guidance=replace(make_guidance(scale, given), scale=1.0),
        height=None if given["height"] is None else check_size(given["height"], "height", factor),
        width=None if given["width"] is None else check_size(given["width"], "width", factor),
        sampler=sampler,
        spacing=spacing,
        timesteps=timesteps,
        sigmas=sigmas,
        eta=check_eta(given["eta"], sampler),
        clip_skip=check_int(given["clip_skip"] or 0, "clip_skip", 0, 100),
        emphasis=check_emphasis(given["emphasis"]),
        strength=check_strength(given),
        **check_hires(given),
        vae_tiling=check_tiling(given.get("vae_tiling")),
    )


def card_settings(model: Any) -> Mapping[str, Any]:
    """What a model's card says about how it is best drawn with."""
    own = model.info.get("ldm") if isinstance(model.info, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def own_scale(model: Any) -> float:
    """The guidance scale that a model's card asks for, or 6. Raises ConfigError where it says no number."""
    return _own(card_settings(model), "guidance_scale", float, GUIDANCE)


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


def check_latents_of(model: Any, latents: torch.Tensor, settings: Settings) -> None:
    """Raise ConfigError unless latents (images, C, h, w) fit the model and the size."""
    h, w = settings.height // model.vae.factor, settings.width // model.vae.factor
    expected, shape = (len(latents), model.vae.latent_channels, h, w), tuple(latents.shape)
    require(shape == expected, f"this model and size need the shape {expected}, got {shape}", "latents")


def check_schedule(settings: Settings, folder: str | os.PathLike | None) -> None:
    """Raise ConfigError where the model's own schedule cannot take these steps and spacing; reads no weight."""
    from ldm.checkpoint import settings_of
    from ldm.diffusion import names
    from ldm.diffusion.schedule import Schedule

    if settings.num_inference_steps is not None:
        _ = settings.runs  # raises where a strength leaves no step
    config = settings_of(folder and Path(folder)).get("scheduler")
    if config is None:
        return  # loading the model says what is wrong with it
    schedule = Schedule.from_diffusers(dict(config))
    names.check(settings.sampler or SAMPLER, schedule.prediction_type, settings.spacing)
    settings.noise_levels(schedule)


def vae_factor(folder: str | os.PathLike | None) -> int | None:
    """Pixels per latent, by the settings of a model or a VAE (folder or file); None where unknown."""
    from ldm.checkpoint import settings_of

    try:
        return 2 ** (len(settings_of(folder and Path(folder))["vae"]["block_out_channels"]) - 1)
    except (KeyError, TypeError):
        return None
