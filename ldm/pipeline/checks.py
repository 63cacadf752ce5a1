"""Each setting's own check: what it may be, and one line that says so where it is not. No weight is read here."""

from __future__ import annotations

import functools
import math
import operator
import re
import secrets
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ldm.config import require
from ldm.diffusion import names
from ldm.diffusion.guidance import Guidance
from ldm.errors import ConfigError, nearest
from ldm.pipeline.keywords import (
    GUIDANCE_WORDS,
    MAX_GUIDANCE,
    MAX_HIRES,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SIZE,
    MAX_STEPS,
    STRENGTH,
)
from ldm.prompts import EMPHASIS

if TYPE_CHECKING:
    import torch

PLAIN = re.compile(r"[ -~]*")  # a text of these characters alone holds no control character


def check_prompts(value: Any, where: str = "prompt") -> tuple[str, ...]:
    """A text or a list of texts as a tuple. Raises ConfigError for None, an empty list, control characters, length."""
    if not isinstance(value, (str, list, tuple)):
        raise ConfigError(f"expected a text or a list of texts, got {value!r:.80}", where=where)
    texts = (value,) if isinstance(value, str) else tuple(value)
    if any(isinstance(text, str) and "\r\n" in text for text in texts):  # Windows' line ends
        texts = tuple(text.replace("\r\n", "\n") if isinstance(text, str) else text for text in texts)
    require(len(texts) > 0, "the list is empty", where)
    for i, text in enumerate(texts):
        place = where if isinstance(value, str) else f"{where}[{i}]"
        require(isinstance(text, str), f"expected a text, got {text!r:.80}", place)
        require(len(text) <= MAX_PROMPT, f"{len(text):,} characters are more than {MAX_PROMPT:,}", place)
        if not PLAIN.fullmatch(text):
            _check_characters(text, place)
    return texts


def _check_characters(text: str, where: str) -> None:
    for position, character in enumerate(text):
        control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        require(not control, f"control character U+{ord(character):04X} at position {position}", where)


def check_negative(value: Any, prompts: int) -> tuple[str | None, ...]:
    """One negative prompt for each prompt; None stands for zeros with XL and for "" elsewhere."""
    texts = (None,) if value is None else check_prompts(value, "negative_prompt")
    many = value is not None and not isinstance(value, str)
    require(not many or len(texts) == prompts, f"{len(texts)} texts for {prompts} prompts", "negative_prompt")
    return texts if many else texts * prompts


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


def check_guidances(value: Any, images: int) -> tuple[float, ...]:
    """The guidance scale of each image, from one for all or a list."""
    if not isinstance(value, (list, tuple)):
        return (check_guidance(value),) * images
    require(len(value) == images, f"{len(value)} scales for {images} images", "guidance_scale")
    return tuple(check_guidance(one) for one in value)


def check_guidance(value: Any, where: str = "guidance_scale") -> float:
    """A finite guidance scale from 0 up, 1 and below being without guidance."""
    number = _number(value, where)
    require(math.isfinite(number), f"{number} is not a finite number", where)
    require(0 <= number <= MAX_GUIDANCE, f"{number:g} is outside 0 to {MAX_GUIDANCE:g}", where)
    return number


def make_guidance(given: Mapping[str, Any]) -> Guidance:
    """The kind of guidance and its options, from generate's keywords. Raises ConfigError naming the keyword."""
    options = {name: given[word] for word, name in GUIDANCE_WORDS.items() if given.get(word) is not None}
    return Guidance(scale=1.0, **options)


def check_size(value: Any, where: str, factor: int | None) -> int:
    """A number of pixels that the VAE's factor (where known) divides. Raises ConfigError naming the nearest two."""
    number = check_int(value, where, 1, MAX_SIZE)
    if factor and number % factor:
        raise _no_multiple(number, factor, where)
    return number


def _no_multiple(number: int, factor: int, where: str) -> ConfigError:
    below, above = number // factor * factor, -(-number // factor) * factor
    near = f"{below} or {above}" if below else str(above)
    return ConfigError(f"{number} is not a multiple of {factor}", where=where, hint=f"use {near}")


def check_sampler(given: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Our names of a sampler and a spacing, from anybody's; a joined label ("DPM++ 2M Karras") gives both."""
    sampler, spacing = given.get("sampler"), given.get("spacing")
    name, joined = (None, None) if sampler is None else names.resolve(sampler)
    spacing = None if spacing is None else names.resolve_spacing(spacing)
    if joined and spacing and joined != spacing:
        raise ConfigError(f"{sampler!r:.80} says {joined}, and {spacing} is given too", where="spacing")
    return name, spacing or joined


def check_eta(value: Any, sampler: str) -> float | None:
    """A number from 0 to 1 for a sampler that takes one; None: the sampler's own."""
    names.options(sampler, value)
    return None if value is None else float(value)


def check_part(value: Any, where: str) -> float:
    """A number above 0 and up to 1."""
    number = _number(value, where)
    require(0 < number <= 1, f"{number:g} is not above 0 and up to 1", where)  # nor is NaN
    return number


def _number(value: Any, where: str) -> float:
    """`value` as a float, which may be NaN; texts and truth values are none."""
    number: Any = None if isinstance(value, (bool, str, bytes)) else value
    try:
        return float(number)
    except (TypeError, ValueError):
        raise ConfigError(f"expected a number, got {value!r:.80}", where=where) from None


def check_strength(given: Mapping[str, Any]) -> dict[str, float | None]:
    """Of image-to-image: 0.8 unless another is given, 1 where the image grows; None without an image."""
    value = given.get("strength")
    number = None if value is None else check_part(value, "strength")
    if given.get("image") is not None:
        return {"strength": number or (1.0 if given.get("outpaint") else STRENGTH)}
    require(number in (None, STRENGTH), "strength needs an image", "strength")
    return {"strength": None}


def check_hires(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of hires-fix: hires_scale, hires_steps, hires_strength, all None without a scale."""
    scale, steps, strength = (given.get(name) for name in ("hires_scale", "hires_steps", "hires_strength"))
    if scale is None:
        for name, value in (("hires_steps", steps), ("hires_strength", strength)):
            require(value is None, f"{name} needs hires_scale", name)
        return {"hires_scale": None, "hires_steps": None, "hires_strength": None}
    scale = check_guidance(scale, where="hires_scale")
    require(1 < scale <= MAX_HIRES, f"{scale:g} is not above 1 and up to {MAX_HIRES}", "hires_scale")
    require(given.get("image") is None, "hires-fix begins at a prompt, not at an image", "hires_scale")
    if steps is not None:
        steps = check_int(steps, "hires_steps", 1, MAX_STEPS)
        explicit = next((name for name in ("timesteps", "sigmas") if given.get(name) is not None), None)
        require(explicit is None, f"does not go with explicit {explicit}", "hires_steps")
    strength = None if strength is None else check_part(strength, "hires_strength")
    return {"hires_scale": scale, "hires_steps": steps, "hires_strength": strength}


def check_tiling(value: Any, where: str = "vae_tiling") -> bool | None:
    """Whether the VAE works in tiles: True, False, or "auto" (None)."""
    if value == "auto":
        return None
    require(isinstance(value, bool), f'expected True, False or "auto", got {value!r:.80}', where)
    return value


def check_variations(given: Mapping[str, Any], num_images: int, prompts: int) -> tuple[tuple[int, float], ...] | None:
    """(seed, strength) for each image: image k of every prompt has variation_seed + k; None without a strength."""
    seed, strength = given.get("variation_seed"), given.get("variation_strength")
    if strength is None or (strength == 0 and not isinstance(strength, bool)):
        require(seed in (None, -1), "needs a variation_strength above 0", "variation_seed")
        return None
    strength = check_part(strength, "variation_strength")
    _, seeds = check_seeds(num_images, seed, prompts, "variation_seed")
    return tuple((one, strength) for one in seeds)


def check_seeds(num_images: Any, seed: Any, prompts: int, where: str = "seed") -> tuple[int, tuple[int, ...]]:
    """(images of each prompt, one seed for each image): image k of every prompt gets seed + k, a list is as it is.

    None and -1 draw below 2**32. A CPU torch.Generator that was not used yet stands for its seed.
    """
    if num_images is not None:
        num_images = check_int(num_images, "num_images", 1, MAX_IMAGES)
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        return _listed_seeds(num_images, seed, prompts, where)
    num_images = num_images or 1
    first = _seed(seed, where, spare=num_images)
    return num_images, tuple(first + k for k in range(num_images)) * prompts


def _listed_seeds(num_images: int | None, seed: Sequence[Any], prompts: int, where: str) -> tuple[int, tuple[int, ...]]:
    if num_images is None and len(seed) % prompts == 0:
        num_images = len(seed) // prompts
    num_images = num_images or 1
    expected = num_images * prompts
    require(len(seed) == expected and expected > 0, f"{len(seed)} seeds for {expected} images", where)
    return num_images, tuple(_seed(s, where=f"{where}[{i}]") for i, s in enumerate(seed))


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


def check_bool(value: Any, where: str) -> bool:
    """True or False and nothing that only looks like it."""
    require(isinstance(value, bool), f"expected True or False, got {value!r:.80}", where)
    return value


def check_emphasis(value: Any, where: str = "emphasis") -> str:
    """How weights in prompts act: original or no_norm."""
    if not isinstance(value, str) or value not in EMPHASIS:
        raise ConfigError(f"unknown emphasis {value!r:.80}", where=where, hint=nearest(str(value), EMPHASIS))
    return value


def check_levels(given: Mapping[str, Any]) -> dict[str, Any]:
    """Noise levels that are chosen one by one: timesteps or sigmas, and how many steps they are."""
    steps, (_, spacing) = given.get("num_inference_steps"), check_sampler(given)
    steps = None if steps is None else check_int(steps, "num_inference_steps", 1, MAX_STEPS)
    timesteps, steps = check_timesteps(given, "timesteps", spacing, steps)
    sigmas, steps = check_timesteps(given, "sigmas", spacing, steps)
    require(timesteps is None or sigmas is None, "give either timesteps or sigmas", "timesteps")
    return {"timesteps": timesteps, "sigmas": sigmas, "num_inference_steps": steps}


def check_timesteps(
    given: Mapping[str, Any], where: str, spacing: str | None, steps: int | None
) -> tuple[tuple[float, ...] | None, int | None]:
    """(explicit timesteps or sigmas as numbers, how many steps they are); sigmas may end in the 0 that ends all.

    Whether a model has them is for its schedule to say.
    """
    value = given.get(where)
    if value is None:
        return None, steps
    try:
        levels = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        raise ConfigError(f"expected a list of numbers, got {value!r:.80}", where=where) from None
    count = len(levels) - (where == "sigmas" and levels[-1:] == (0,))
    require(1 <= count <= MAX_STEPS, f"{count} noise levels are outside 1 to {MAX_STEPS}", where)
    require(spacing is None, f"spacing '{spacing}' chooses the noise levels too; leave one of them out", where)
    require(steps in (None, count), f"{count} of them for {steps} steps; leave num_inference_steps out", where)
    return levels, count


# What generate is given of Settings: one by one, and those that are checked together.
CHECKS: dict[str, tuple[Callable[..., Any], Any]] = {  # keyword -> (its check, a value that changes nothing)
    "num_inference_steps": (functools.partial(check_int, least=1, most=MAX_STEPS), None),
    "step_cache": (functools.partial(check_int, least=1, most=MAX_STEPS), 1),
    "clip_skip": (functools.partial(check_int, least=0, most=100), 0),
    "emphasis": (check_emphasis, "original"),
    "vae_tiling": (check_tiling, "auto"),
}
TOGETHER: dict[Callable[..., dict[str, Any]], tuple[str, ...]] = {
    check_levels: ("timesteps", "sigmas"),
    check_strength: ("image", "strength"),
    check_hires: ("hires_scale", "hires_steps", "hires_strength"),
}


def is_given(given: Mapping[str, Any], *words: str) -> bool:
    """Whether any of these keywords has a value."""
    return any(given.get(word) is not None for word in words)


def check_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of CHECKS and TOGETHER that are given, checked. Raises ConfigError naming the keyword."""
    found: dict[str, Any] = {}
    for word, (check, neutral) in CHECKS.items():
        if given.get(word) not in (None, neutral):
            found[word] = check(given[word], word)
    for check, words in TOGETHER.items():
        found |= check(given) if is_given(given, *words) else {}
    return found
