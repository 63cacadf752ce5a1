"""What one call of generate was asked, checked before any weight is read, and completed once the model is known."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.config import require
from ldm.errors import ConfigError
from ldm.pipeline.settings.checks import (
    check_bool,
    check_callback,
    check_emphasis,
    check_eta,
    check_guidance,
    check_int,
    check_latents,
    check_levels,
    check_sampler,
    check_seeds,
    check_size,
    make_guidance,
)
from ldm.pipeline.settings.words import BATCH, GUIDANCE, LATENT_SIZE, MAX_IMAGES, MAX_STEPS, SAMPLER, STEPS, UNSUPPORTED

if TYPE_CHECKING:
    import torch

    from ldm.diffusion.guidance import Guidance
    from ldm.diffusion.schedule import Schedule


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn that may be in one batch; None where the model decides (see `resolve`)."""

    num_inference_steps: int | None
    height: int | None  # pixels
    width: int | None
    sampler: str | None
    spacing: str | None  # None: the model's own
    eta: float | None  # of samplers that have one; None: theirs
    guidance: Guidance  # but for its scale, which is each picture's own
    timesteps: tuple[float, ...] | None = None  # in place of a spacing's
    sigmas: tuple[float, ...] | None = None  # likewise
    clip_skip: int = 0  # layers of the text encoder that are left out, as diffusers counts
    emphasis: str = "original"  # or no_norm (ldm.nn.text.encode_weighted)

    def resolve(self, model: Any, latents: torch.Tensor | None = None) -> Settings:
        """With every default of `model` filled in; `latents` decide the size where nothing else does.

        Raises ConfigError where size, steps or latents do not fit the model.
        """
        from ldm.diffusion import names
        from ldm.diffusion.guidance.guided import zero_init

        if model.unet.config.in_channels != model.vae.latent_channels:
            raise ConfigError(f"{model.name} is an inpainting model; {UNSUPPORTED['mask_image'][1]}", where="model")
        own = card_settings(model)
        sampler, joined = names.resolve(self.sampler or own.get("sampler", SAMPLER))
        side = (model.unet.config.sample_size or LATENT_SIZE) * model.vae.factor
        h, w = latents.shape[2:] if latents is not None else (None, None)
        filled = replace(
            self,
            num_inference_steps=self.num_inference_steps or _own(own, "num_inference_steps", int, STEPS),
            sampler=sampler,
            spacing=None if self.levels else self._spacing(sampler, joined, own, model),
            height=self.height or (h * model.vae.factor if h else side),
            width=self.width or (w * model.vae.factor if w else side),
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
        return filled

    def _spacing(self, sampler: str, joined: str | None, own: Mapping[str, Any], model: Any) -> str | None:
        spacing = self.spacing or joined or (None if sampler == "lcm" else own.get("spacing"))  # lcm has its own
        xl = model.unet.config.addition_embed_type == "text_time"
        return "ays_xl" if spacing == "ays" and xl else spacing

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
class Call:
    """One call of generate: its settings, and what pictures have of their own."""

    settings: Settings
    num_images: int  # of each prompt
    seeds: tuple[int, ...]  # one for each image, prompt by prompt
    guidance_scale: float | tuple[float, ...] | None  # of all, or one for each image; None: the model's
    latents: torch.Tensor | None  # (images, C, h, w)
    batch_size: int  # images that are denoised together; has no influence on the pictures
    callback: Callable | None
    strict: bool  # whether what would be a warning about a prompt is an error


def check_call(given: Mapping[str, Any], prompts: int, folder: Path | None = None) -> Call:
    """Checks generate's keywords (under our names) for `prompts` prompts; `folder` is where configs can be read.

    Raises ConfigError naming the setting and the values that would do.
    """
    num_images, seeds = check_seeds(given["num_images"], given["seed"], prompts)
    scale = None if given["guidance_scale"] is None else check_guidance(given["guidance_scale"], len(seeds))
    batch_size = given.get("batch_size")
    return Call(
        settings=_check_settings(given, GUIDANCE if scale is None else scale, vae_factor(folder)),
        num_images=num_images,
        seeds=seeds,
        guidance_scale=scale,
        latents=None if given["latents"] is None else check_latents(given["latents"], len(seeds)),
        batch_size=BATCH if batch_size is None else check_int(batch_size, "batch_size", 1, MAX_IMAGES),
        callback=check_callback(given["callback"]),
        strict=check_bool(given["strict"], "strict"),
    )


def _check_settings(given: Mapping[str, Any], scale: float | Sequence[float], factor: int | None) -> Settings:
    steps, (sampler, spacing) = given["num_inference_steps"], check_sampler(given["sampler"], given["spacing"])
    steps = None if steps is None else check_int(steps, "num_inference_steps", 1, MAX_STEPS)
    timesteps, sigmas = (check_levels(given[name], name, spacing, steps) for name in ("timesteps", "sigmas"))
    require(timesteps is None or sigmas is None, "give either timesteps or sigmas", "timesteps")
    levels = timesteps or sigmas
    return Settings(
        num_inference_steps=len(levels) - (levels[-1] == 0 and sigmas is not None) if levels else steps,
        height=None if given["height"] is None else check_size(given["height"], "height", factor),
        width=None if given["width"] is None else check_size(given["width"], "width", factor),
        sampler=sampler,
        spacing=spacing,
        eta=check_eta(given["eta"], sampler),
        guidance=replace(make_guidance(scale, given), scale=1.0),
        timesteps=timesteps,
        sigmas=sigmas,
        clip_skip=check_int(given["clip_skip"] or 0, "clip_skip", 0, 100),
        emphasis=check_emphasis(given["emphasis"]),
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
