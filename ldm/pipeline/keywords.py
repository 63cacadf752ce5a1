"""The keywords of Pipeline and generate: aliases of them, and what is known and refused.

Imports nothing heavy, so that the command line can print the tables in its help.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.errors import ConfigError, nearest

STEPS, GUIDANCE, SAMPLER, BATCH = 25, 6.0, "dpmpp_2m", 8  # where the model says nothing
MAX_STEPS, MAX_GUIDANCE, MAX_SIZE, MAX_PROMPT, MAX_IMAGES = 1000, 1000.0, 8192, 100_000, 100_000

# Keywords of diffusers, A1111 and kohya -> ours.
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
    "gamma": "eta",
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "hr_scale": "hires_scale",
    "hr_second_pass_steps": "hires_steps",
    "hires_denoising_strength": "hires_strength",
    "adapter_conditioning_scale": "controlnet_conditioning_scale",
    "adapter_conditioning_factor": "control_guidance_end",
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
# generate's keywords for initial images, variations and hires-fix.
EDITING_WORDS: tuple[str, ...] = ("image", "mask_image", "strength", "outpaint", "variation_seed", "variation_strength")
EDITING_WORDS += ("hires_scale", "hires_steps", "hires_strength", "vae_tiling")
# generate's keywords for ControlNets.
CONTROL_WORDS: tuple[str, ...] = ("control_image", "controlnet_conditioning_scale", "control_guidance_start")
CONTROL_WORDS += ("control_guidance_end", "control_mode", "guess_mode")
# generate's keywords for IP-Adapters.
SHOWN_WORDS = ("ip_adapter_image", "ip_adapter_scale", "ip_adapter_mask")
STRENGTH, HIRES_STRENGTH, MAX_HIRES = 0.8, 0.7, 8  # the first two: where nobody says another
DEFAULTS = {"model": "default", "negative_prompt": "", "device": "auto", "dtype": "auto"}  # of Pipeline(...)
# What is known and refused: name -> (values that change nothing, what to tell whoever gives another).
UNSUPPORTED: dict[str, tuple[tuple, str]] = {
    "prompt_embeds": ((None,), "embeddings in place of a prompt are not supported"),
    "negative_prompt_embeds": ((None,), "embeddings in place of a prompt are not supported"),
    "cross_attention_kwargs": ((None,), "there are no attention processors to hand settings to"),
    "callback_on_step_end_tensor_inputs": ((None,), "callbacks are given (i, x, x0)"),
    "ip_adapter_image_embeds": ((None,), "embeddings in place of ip_adapter_image are not supported"),
    "output_type": ((None, "pil"), "the result is always PIL images; ldm.images.to_tensor turns them into tensors"),
    "return_dict": ((None, True), "the result is always a sequence of images with .seeds and .metadata"),
    "scheduler": ((None,), "say sampler= for the solver and spacing= for its noise levels"),
}


def resolve_aliases(given: Mapping[str, Any], own: Mapping[str, Any], other: Sequence[str] = ()) -> dict[str, Any]:
    """`given` under our names; `own` are the caller's keywords with their values, `other` are known elsewhere.

    Raises ConfigError for an unknown keyword (with the nearest), one setting given twice, and what is not supported.
    """
    settings = dict(own)
    for word, value in given.items():
        name = ALIASES.get(word, word)
        if name in other:
            belongs = "Pipeline(...)" if "num_images" in own else "generate(...)"
            raise ConfigError(f"{word} belongs to {belongs}", where=word)
        if name not in own and name not in UNSUPPORTED:
            raise ConfigError(f"unknown setting {word!r}", hint=nearest(word, [*own, *ALIASES]))
        if name in own and settings[name] not in (None, DEFAULTS.get(name), value):
            raise ConfigError(f"{word} and {name} are the same setting, and both are given", where=word)
        settings[name] = adapt_callback(value) if word == "callback_on_step_end" else value
    for name in [name for name in settings if name in UNSUPPORTED]:
        neutral, sentence = UNSUPPORTED[name]
        value = settings.pop(name)
        if not any(value is item or (type(value) in (int, float, str) and value == item) for item in neutral):
            raise ConfigError(sentence, where=name)
    return settings


def adapter_scales(text: str, where: str = "ip_adapter_scale") -> tuple[Any, ...]:
    """One scale for each IP-Adapter from "0.6", "0.6,0.4", or JSON. Raises ConfigError."""
    try:
        value = json.loads(text if text.lstrip().startswith(("{", "[")) else f"[{text}]")
    except ValueError:
        what, hint = f"expected numbers, or levels as JSON, got {text!r:.80}", '0.6, or {"up": {"block_0": [0, 1, 0]}}'
        raise ConfigError(what, where=where, hint=hint) from None
    return tuple(value) if isinstance(value, list) else (value,)


def control_modes(text: str, where: str = "control_mode") -> tuple[int | tuple[int | None, ...] | None, ...]:
    """Kinds of condition from "3", "3,-" (one for each ControlNet, - for one without) or "3+1,-" (two for the first).

    Raises ConfigError.
    """
    try:
        each = [[None if n.strip() == "-" else int(n) for n in one.split("+")] for one in text.split(",")]
    except ValueError:
        what, hint = f"expected whole numbers, got {text!r:.80}", "3 or 3,-; for several images of one union 3+1"
        raise ConfigError(what, where=where, hint=hint) from None
    return tuple(one[0] if len(one) == 1 else tuple(one) for one in each)


def adapt_callback(function: Callable) -> Callable:
    """diffusers' callback_on_step_end(pipe, step, timestep, kwargs) as ours; it may look, not change."""

    def callback(i, x, x0):
        answer = function(None, i, None, {"latents": x})
        if isinstance(answer, Mapping) and answer.get("latents", x) is not x:
            raise ConfigError("the callback must not change latents", where="callback_on_step_end")

    return callback if callable(function) else function
