"""A1111's API, for the programs that speak it: /sdapi/v1/….

A field that is not given is the model's own default, not A1111's; a given one means the same as there. Fields are
taken (TAKEN), change nothing in any value (IGNORED), or are refused unless they hold a value that changes nothing
(NEUTRAL); any other field is refused by name.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ldm.checkpoint.describe import ModelInfo
from ldm.diffusion import names
from ldm.diffusion.inpaint import steps_before
from ldm.errors import ConfigError, nearest, require
from ldm.images import Metadata, encode
from ldm.pipeline.checks import check_int, check_part
from ldm.pipeline.metadata import parameters
from ldm.pipeline.request import card_hires_strength, card_steps
from ldm.render.replay.a1111_settings import automatic_spacing
from ldm.web import limits
from ldm.web.api import metadata_of
from ldm.web.catalog import Catalog
from ldm.web.http import Context, answering, draw, read_json, refuse_unknown
from ldm.web.jobs import Job
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


def routes(context: Context) -> list[Route]:
    """The routes of /sdapi/v1."""

    def at(path: str, route: Any, method: str = "GET") -> Route:
        return Route(f"/sdapi/v1/{path}", answering(context, route), methods=[method])

    return [
        at("txt2img", txt2img, "POST"),
        at("img2img", img2img, "POST"),
        at("options", options),
        at("options", set_options, "POST"),
        at("samplers", samplers),
        at("schedulers", schedulers),
        at("sd-models", sd_models),
        at("sd-vae", sd_vae),
        at("loras", loras),
        at("progress", progress),
        at("interrupt", interrupt, "POST"),
        at("png-info", png_info, "POST"),
    ]


async def txt2img(context: Context, request: Request) -> Response:
    """Draw images of a prompt."""
    given = await read_json(request)
    return await _draw(context, request, given, await context.thread(fields_of, given, TXT2IMG, context.catalog))


async def img2img(context: Context, request: Request) -> Response:
    """Draw images that begin at another, with or without a mask."""
    given = await read_json(request)
    fields = await context.thread(fields_of, given, IMG2IMG, context.catalog)
    require("image" in fields, "one image is needed", "init_images")
    return await _draw(context, request, given, fields)


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
        fields["model"] = _without_hash(given["sd_model_checkpoint"])
    if given.get("sd_vae") not in (None, "", "Automatic", "None"):
        fields["vae"] = given["sd_vae"]
    layers = given.get("CLIP_stop_at_last_layers")
    if layers is not None:
        require(type(layers) is int and 1 <= layers <= 100, "expected a whole number", "CLIP_stop_at_last_layers")
        fields["clip_skip"] = layers - 1  # A1111 counts from 1
    return fields


def _without_hash(title: Any) -> Any:
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


async def _draw(context: Context, request: Request, given: dict[str, Any], fields: dict[str, Any]) -> Response:
    job = await draw(context, request, fields, keep=given.get("save_images") is True)
    results = await context.thread(finished_images, context, job)
    shown = [base64.b64encode(data).decode("ascii") for data, _ in results]
    echo = {name: value for name, value in given.items() if name not in ("init_images", "mask")}
    answer = {"images": shown if given.get("send_images") is not False else [], "parameters": echo}
    return JSONResponse({**answer, "info": json.dumps(_info([metadata for _, metadata in results]))})


def finished_images(context: Context, job: Job) -> list[tuple[bytes, dict[str, Any]]]:
    """(PNG with its metadata, metadata) of each image of a job that is over; fewer where it was interrupted."""
    found = []
    for image, metadata in job.results:
        found.append((encode(image, "png", Metadata(parameters(metadata), metadata)), metadata))
    for id in job.images:
        data, line = context.store.image_bytes(id), context.store.image(id)
        if data is not None and line is not None:
            found.append((data, line["metadata"]))
    return found


def _info(all_metadata: list[dict[str, Any]]) -> dict[str, Any]:
    """What A1111 says of a call's images."""
    if not all_metadata:
        return {"infotexts": [], "all_seeds": [], "all_prompts": []}
    first = all_metadata[0]
    texts = [one.get("parameters") or parameters(one) for one in all_metadata]
    seeds = [one["seed"] for one in all_metadata]
    return {
        "prompt": first["prompt"],
        "all_prompts": [one["prompt"] for one in all_metadata],
        "negative_prompt": first["negative_prompt"] or "",
        "all_negative_prompts": [one["negative_prompt"] or "" for one in all_metadata],
        "seed": first["seed"],
        "all_seeds": seeds,
        "subseed": first.get("variation_seed", -1),
        "all_subseeds": [one.get("variation_seed", -1) for one in all_metadata],
        "subseed_strength": first.get("variation_strength", 0),
        "width": first["width"],
        "height": first["height"],
        "sampler_name": names.SAMPLER_NAMES[first["sampler"]][0],
        "cfg_scale": first["guidance_scale"],
        "steps": first["num_inference_steps"],
        "batch_size": len(all_metadata),
        "restore_faces": False,
        "sd_model_name": first["model"],
        "sd_model_hash": (first["model_hash"] or "")[:10],
        "denoising_strength": first.get("hires_strength") or first.get("strength"),
        "clip_skip": (first.get("clip_skip") or 0) + 1,
        "index_of_first_image": 0,
        "infotexts": texts,
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "extra_generation_params": {},
        "is_using_inpainting_conditioning": False,
        "version": f"ldm {first['versions']['ldm']}",
    }


async def options(context: Context, request: Request) -> Response:
    """The options that a request may override, with their values."""
    values = {"sd_model_checkpoint": context.catalog.default, "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1}
    return JSONResponse({**values, "samples_format": "png"})


async def set_options(context: Context, request: Request) -> Response:
    """Refused: requests of one client do not change those of others. Values that are in force already are taken."""
    given = await read_json(request)
    now = {
        "sd_model_checkpoint": (context.catalog.default,),
        "sd_vae": ("Automatic", "None"),
        "samples_format": ("png",),
    }
    now["CLIP_stop_at_last_layers"] = (1,)
    for name, value in given.items():
        if (_without_hash(value) if isinstance(value, str) else value) not in now.get(name, ()):
            hint = "give it as override_settings of the request that it is for"
            raise ConfigError("cannot be changed for all clients", where=name[:80], hint=hint)
    return JSONResponse({})


async def samplers(context: Context, request: Request) -> Response:
    """The samplers that go with the default model, by A1111's names."""
    listed = (await context.thread(context.catalog.described, context.catalog.default))["samplers"]
    found = [{"name": one["label"], "aliases": [one["name"]], "options": {}} for one in listed]
    return JSONResponse(found)


async def schedulers(context: Context, request: Request) -> Response:
    """The spacings that go with the default model."""
    listed = (await context.thread(context.catalog.described, context.catalog.default))["spacings"]
    found = [{"name": "automatic", "label": "Automatic", "aliases": None}]
    return JSONResponse(found + [{**one, "aliases": None} for one in listed])


async def sd_models(context: Context, request: Request) -> Response:
    """The models that `override_settings.sd_model_checkpoint` may name."""
    return JSONResponse(
        [
            {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
            for name in context.catalog.models
        ]
    )


async def sd_vae(context: Context, request: Request) -> Response:
    """The VAEs that `override_settings.sd_vae` may name."""
    return JSONResponse([{"model_name": name, "filename": name} for name in context.catalog.vaes])


async def loras(context: Context, request: Request) -> Response:
    """The LoRAs that prompts may name as <lora:name:weight>."""
    return JSONResponse([{"name": name, "alias": name, "path": name} for name in context.catalog.loras])


async def progress(context: Context, request: Request) -> Response:
    """How far the job at work is, with a preview unless `skip_current_image` is true."""
    job = context.queue.current
    state = {"skipped": False, "interrupted": job is not None and job.stopped, "job": "" if job is None else job.id}
    state |= {"job_count": len(context.queue.listed()), "job_no": 0, "job_timestamp": "0"}
    state |= {"sampling_step": job.step if job else 0, "sampling_steps": job.steps if job else 0}
    shown = job.public() if job else {"progress": 0.0, "seconds_left": None}
    preview = None
    skip = request.query_params.get("skip_current_image", "false").lower() in ("true", "1")
    if job is not None and job.previews and not skip:
        preview = await context.thread(_preview, job.previews[-1])
    answer = {"progress": shown["progress"], "eta_relative": shown["seconds_left"] or 0.0, "state": state}
    return JSONResponse({**answer, "current_image": preview, "textinfo": None})


def _preview(step: Any) -> str:
    image: Image.Image = step.preview
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


async def interrupt(context: Context, request: Request) -> Response:
    """Stop the job at work after its step; its call returns the images that are finished."""
    job = context.queue.current
    if job is not None:
        await context.thread(context.queue.stop, job.id)
    return JSONResponse({})


async def png_info(context: Context, request: Request) -> Response:
    """The `parameters` text of an image that is given as base64."""
    given = await read_json(request)
    found = await context.thread(metadata_of, decode_base64(given.get("image"), "image"))
    text = found.parameters
    return JSONResponse({"info": text, "items": {"parameters": text} if text else {}, "parameters": {}})
