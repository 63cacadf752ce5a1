"""A1111's API, for the programs that speak it: /sdapi/v1/…. What a request may say is in sdapi_fields."""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ldm.diffusion import names
from ldm.errors import ConfigError, require
from ldm.images import Metadata, encode
from ldm.pipeline.metadata import parameters
from ldm.web.api import metadata_of
from ldm.web.http import Context, answering, draw, read_json
from ldm.web.jobs import Job
from ldm.web.request import decode_base64
from ldm.web.sdapi_fields import IMG2IMG, TXT2IMG, fields_of, without_hash


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
        if (without_hash(value) if isinstance(value, str) else value) not in now.get(name, ()):
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
