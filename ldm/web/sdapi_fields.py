"""The fields of A1111's txt2img and img2img in our words.

A field that is not given is the model's own default, not A1111's; a given one means the same as there. Fields are
taken (TAKEN), change nothing in any value (IGNORED), or are refused unless they hold a value that changes nothing
(NEUTRAL); any other field is refused by name.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from PIL import ImageOps

from ldm.checkpoint.describe import ModelInfo
from ldm.diffusion import names
from ldm.diffusion.inpaint import steps_before
from ldm.errors import ConfigError, nearest, require
from ldm.images import encode
from ldm.pipeline.checks import check_int, check_part
from ldm.pipeline.request import card_hires_strength, card_steps
from ldm.render.replay.a1111_settings import automatic_spacing
from ldm.web import limits
from ldm.web.catalog import Catalog
from ldm.web.http import refuse_unknown
from ldm.web.request import decode_base64, opened_mask

TAKEN = {  # A1111's field -> ours, where the value is the same
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "subseed": "variation_seed",
    "subseed_strength": "variation_strength",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "eta": "eta",
}
TAKEN_OTHERWISE = ("batch_size", "n_iter", "sampler_name", "sampler_index", "scheduler", "override_settings")
TAKEN_OTHERWISE += ("save_images", "send_images")
TXT2IMG = ("enable_hr", "hr_scale", "hr_second_pass_steps", "denoising_strength")
IMG2IMG = ("init_images", "mask", "denoising_strength", "inpainting_mask_invert")
IGNORED = ("do_not_save_samples", "do_not_save_grid", "force_task_id", "comments", "include_init_images")
IGNORED += ("override_settings_restore_afterwards",)
NONE, OFF = (None,), (None, False)
NEUTRAL: dict[str, tuple] = {
    "styles": (None, []),
    "seed_resize_from_h": (None, -1, 0),
    "seed_resize_from_w": (None, -1, 0),
    "restore_faces": OFF,
    "tiling": OFF,
    "s_churn": (None, 0, 0.0),
    "s_tmin": (None, 0, 0.0),
    "s_tmax": (None, 0, 0.0),
    "s_noise": (None, 1, 1.0),
    "s_min_uncond": (None, 0, 0.0),
    "refiner_checkpoint": (None, "", "None"),
    "refiner_switch_at": (None, 0, 0.0, 1, 1.0, 0.8),
    "disable_extra_networks": OFF,
    "infotext": (None, ""),
    "script_name": (None, "", "None"),
    "script_args": (None, []),
    "alwayson_scripts": (None, {}),
    "firstphase_width": (None, 0),
    "firstphase_height": (None, 0),
    "hr_upscaler": (None, "Lanczos", "None"),
    "hr_resize_x": (None, 0),
    "hr_resize_y": (None, 0),
    "hr_checkpoint_name": (None, "", "Use same checkpoint"),
    "hr_sampler_name": (None, "", "Use same sampler"),
    "hr_scheduler": (None, "", "Use same scheduler"),
    "hr_prompt": (None, ""),
    "hr_negative_prompt": (None, ""),
    "resize_mode": (None, 0),
    "image_cfg_scale": NONE,
    "mask_blur": (None, 0),
    "mask_blur_x": (None, 0),
    "mask_blur_y": (None, 0),
    "mask_round": (None, True),
    "inpainting_fill": (None, 1),
    "inpaint_full_res": (None, False, 0),
    "inpaint_full_res_padding": (None, 0, 32),
    "initial_noise_multiplier": (None, 1, 1.0),
    "latent_mask": NONE,
}
HINTS = {
    "hr_upscaler": "only Lanczos enlarges here",
    "mask_blur": "masks are used as they are: send 0",
    "inpainting_fill": "the image itself is begun at: send 1",
    "inpaint_full_res": "the whole image is drawn: send false",
    "alwayson_scripts": "there are no scripts here",
    "script_name": "there are no scripts here",
}
UNMASKED = ("mask_blur", "mask_blur_x", "mask_blur_y", "mask_round", "inpainting_fill", "inpaint_full_res")
UNMASKED += ("inpaint_full_res_padding", "inpainting_mask_invert")  # change nothing without a mask
HIRES = ("hr_upscaler", "hr_scale", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y", "denoising_strength")
OPTIONS = ("sd_model_checkpoint", "sd_vae", "CLIP_stop_at_last_layers")


def fields_of(given: Mapping[str, Any], own: tuple[str, ...], catalog: Catalog) -> dict[str, Any]:
    """A request in our words. Raises ConfigError for a field that is unknown or not supported."""
    _check_known(given, own)
    fields = {ours: given[name] for name, ours in TAKEN.items() if given.get(name) is not None}
    if fields.get("variation_seed") == -1 and not fields.get("variation_strength"):
        fields.pop("variation_seed")
    if not fields.get("variation_strength"):
        fields.pop("variation_strength", None)
        fields.pop("variation_seed", None)
    counts = [given.get(name) for name in ("batch_size", "n_iter") if given.get(name) is not None]
    for count in counts:
        require(type(count) is int and 1 <= count <= 64, "expected a number from 1 to 64", "batch_size")
    fields["num_images"] = (counts[0] if counts else 1) * (counts[1] if len(counts) > 1 else 1)
    if sampler := given.get("sampler_name") or given.get("sampler_index"):  # clients send an index beside the name
        fields["sampler"] = sampler
    fields |= _overrides(given.get("override_settings"))
    model = fields.get("model", catalog.default)
    catalog.pick("model", model)
    info = catalog.info(model)
    fields |= _scheduler(given.get("scheduler"), fields.get("sampler"), info)
    if given.get("enable_hr"):
        fields |= _hires(given, fields, info)
    if own == IMG2IMG:
        fields |= _images(given)
    return fields


def _check_known(given: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raise ConfigError for a field that is unknown or not supported."""
    known = (*TAKEN, *TAKEN_OTHERWISE, *own, *IGNORED, *NEUTRAL)
    unused = set() if given.get("enable_hr") else set(HIRES if own == TXT2IMG else ())
    unused |= set() if given.get("mask") else set(UNMASKED)
    for name in given:
        if name not in known:
            raise ConfigError(f"unknown field {name!r:.80}", where=name[:80], hint=nearest(name[:80], known))
    refuse_unknown({name: value for name, value in given.items() if name not in unused}, NEUTRAL, HINTS)


def _overrides(given: Any) -> dict[str, Any]:
    if given in (None, {}):
        return {}
    require(isinstance(given, dict), "expected an object", "override_settings")
    for name in given:
        if name not in OPTIONS:
            where, hint = f"override_settings.{name[:80]}", f"there are {', '.join(OPTIONS)}"
            raise ConfigError("is not supported", where=where, hint=hint)
    fields: dict[str, Any] = {}
    if given.get("sd_model_checkpoint"):
        fields["model"] = without_hash(given["sd_model_checkpoint"])
    if given.get("sd_vae") not in (None, "", "Automatic", "None"):
        fields["vae"] = given["sd_vae"]
    layers = given.get("CLIP_stop_at_last_layers")
    if layers is not None:
        require(type(layers) is int and 1 <= layers <= 100, "expected a whole number", "CLIP_stop_at_last_layers")
        fields["clip_skip"] = layers - 1  # A1111 counts from 1
    return fields


def without_hash(title: Any) -> Any:
    """A model's name from A1111's title: name [hash]."""
    return title.partition(" [")[0] if isinstance(title, str) else title


def _scheduler(scheduler: Any, sampler: Any, info: ModelInfo) -> dict[str, Any]:
    """The spacing of a schedule type; "Automatic" is A1111's choice for a sampler that is named, else the model's."""
    if scheduler in (None, ""):
        return {}
    if not isinstance(scheduler, str) or scheduler.lower() != "automatic":
        return {"spacing": scheduler}
    if sampler is None or info.schedule.is_flow:
        return {}
    own, joined = names.resolve(sampler)
    spacing = None if joined else automatic_spacing(own)  # "DPM++ 2M Karras" says it itself
    return {} if spacing is None else {"spacing": spacing}


def _hires(given: Mapping[str, Any], fields: Mapping[str, Any], info: ModelInfo) -> dict[str, Any]:
    """Hires-fix: A1111 runs the requested steps, or as many as before; we run a share, the strength, of hires_steps."""
    found: dict[str, Any] = {"hires_scale": given.get("hr_scale") or 2.0}
    strength, steps = given.get("denoising_strength"), given.get("hr_second_pass_steps")
    if strength is None:
        found["hires_strength"] = card_hires_strength(info)
    else:
        found["hires_strength"] = check_part(strength, "denoising_strength")
    if steps not in (None, 0):
        steps = check_int(steps, "hr_second_pass_steps", 1, limits.MAX_STEPS)
    else:
        steps = check_int(fields.get("num_inference_steps", card_steps(info)), "steps", 1, limits.MAX_STEPS)
    return {**found, "hires_steps": steps_before(steps, found["hires_strength"])}


def _images(given: Mapping[str, Any]) -> dict[str, Any]:
    images = given.get("init_images")
    require(isinstance(images, list) and len(images) == 1, "one image is needed", "init_images")
    fields = {"image": images[0]}
    if given.get("denoising_strength") is not None:
        fields["strength"] = given["denoising_strength"]
    if given.get("mask"):
        invert = given.get("inpainting_mask_invert") or 0
        require(invert in (0, 1), "expected 0 or 1", "inpainting_mask_invert")
        fields["mask_image"] = _mask(given["mask"], bool(invert))
    return fields


def _mask(mask: Any, invert: bool) -> str:
    """A mask as A1111 reads it: where its transparency varies, what is opaque is white, and what is not is black."""
    image = opened_mask(decode_base64(mask, "mask"), "mask")
    if image.mode == "RGBA":
        image = image.getchannel("A").point(lambda level: 255 if level > 128 else 0)
    image = image.convert("RGB")
    return base64.b64encode(encode(ImageOps.invert(image) if invert else image)).decode("ascii")
