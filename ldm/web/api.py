"""Our own API: jobs that outlive their client, events, the gallery, and what the page asks about models and prompts."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ldm.errors import ConfigError, require
from ldm.file_names import slug
from ldm.images import Metadata, read_metadata
from ldm.pipeline.keywords import GUIDANCE_WORDS
from ldm.render.replay.a1111_settings import a1111_settings, fit_spacing
from ldm.render.replay.a1111_text import read_infotext
from ldm.render.replay.foreign_json import is_json, read_foreign
from ldm.render.replay.overrides import Changes
from ldm.web import limits
from ldm.web.catalog import Catalog
from ldm.web.http import Context, answering, client_of, read_json
from ldm.web.jobs import FINISHED
from ldm.web.limits import Refused
from ldm.web.request import AXES, OFFERED, analyse, decode_base64, opened
from ldm.web.store import ID

PAGE = 48  # images of one answer
NO_SUCH = "unknown"
RESTORED = tuple(
    name for name in OFFERED if name not in ("image", "mask_image", "model", "vae", "lora", "grid", "strict")
)


def routes(context: Context) -> list[Route]:
    """The routes of /api and /images."""

    def at(path: str, route: Any, *methods: str) -> Route:
        return Route(path, answering(context, route), methods=methods)

    return [
        at("/api/info", info, "GET"),
        at("/api/prompt", prompt, "POST"),
        at("/api/read", read, "POST"),
        at("/api/jobs", jobs, "GET"),
        at("/api/jobs", submit, "POST"),
        at("/api/jobs", stop_all, "DELETE"),
        at("/api/jobs/{id}", job, "GET"),
        at("/api/jobs/{id}", stop, "DELETE"),
        at("/api/jobs/{id}/events", job_events, "GET"),
        at("/api/events", events, "GET"),
        at("/api/images", images, "GET"),
        at("/api/images/{id}", image, "GET"),
        at("/api/images/{id}", delete, "DELETE"),
        at("/images/{name}", image_file, "GET"),
    ]


async def info(context: Context, request: Request) -> Response:
    """Models with their defaults, VAEs, LoRAs, and the server's limits."""
    catalog = context.catalog
    models = [await context.thread(catalog.described, name) for name in catalog.models]
    most = {"images": limits.MAX_IMAGES, "cells": limits.MAX_CELLS, "steps": limits.MAX_STEPS}
    most |= {"pixels": limits.MAX_PIXELS, "upload": limits.MAX_UPLOAD}
    guidances = {"words": list(GUIDANCE_WORDS), "axes": list(AXES)}
    lists = {"models": models, "vaes": list(catalog.vaes), "loras": list(catalog.loras)}
    return JSONResponse({"version": context.version, **lists, "limits": most, **guidances})


async def prompt(context: Context, request: Request) -> Response:
    """How the model reads a prompt and a negative prompt: tokens, unknown words, odd brackets."""
    given = await read_json(request)
    model = given.get("model") or context.catalog.default
    context.catalog.pick("model", model)
    found = {}
    for name in ("prompt", "negative_prompt"):
        text = given.get(name) or ""
        require(isinstance(text, str) and len(text) <= limits.MAX_PROMPT, "expected a text of limited length", name)
        try:
            found[name] = await context.thread(analyse, context.catalog, text, model)
        except ConfigError as error:
            found[name] = {"error": error.what}
    return JSONResponse(found)


async def submit(context: Context, request: Request) -> Response:
    """Put a job into the queue: 201 and the job."""
    checked = await context.thread(context.reader.read, await read_json(request))
    job = await context.thread(context.queue.submit, checked, *client_of(request))
    return JSONResponse(job.public(), 201, headers={"location": f"/api/jobs/{job.id}"})


async def jobs(context: Context, request: Request) -> Response:
    """The job at work and those that wait, in order; without calls that wait for their answer."""
    return JSONResponse({"jobs": [job.public() for job in context.queue.listed() if job.keep]})


async def job(context: Context, request: Request) -> Response:
    """One job, waiting, at work or over."""
    return JSONResponse(_job(context, request.path_params["id"]))


def _job(context: Context, id: str) -> dict[str, Any]:
    live = context.queue.find(id)
    found = live.public() if live is not None and live.keep else context.store.job(id)
    if found is None:
        raise Refused(404, NO_SUCH)
    if "seeds" in found["request"]:  # the ledger's
        found["request"] = found["request"]["fields"]
    return found


async def stop(context: Context, request: Request) -> Response:
    """Stop a job: at once where it waits, after its step where it is at work."""
    found = _job(context, request.path_params["id"])
    await context.thread(context.queue.stop, found["id"])
    return JSONResponse({"id": found["id"], "stopped": True})


async def stop_all(context: Context, request: Request) -> Response:
    """Stop every job of the queue that waits or is at work."""
    listed = [job for job in context.queue.listed() if job.keep]
    for one in reversed(listed):
        await context.thread(context.queue.stop, one.id)
    return JSONResponse({"stopped": len(listed)})


async def events(context: Context, request: Request) -> Response:
    """Everything that happens: "job", "progress" with previews, "image", "deleted"."""
    queue = context.events.open()
    first = [("job", job.public()) for job in context.queue.listed() if job.keep]
    return _stream(context.events.stream(queue, [("hello", {"version": context.version}), *first]))


async def job_events(context: Context, request: Request) -> Response:
    """What happens to one job; the stream ends when the job is over."""
    queue = context.events.open(request.path_params["id"])
    try:
        found = _job(context, request.path_params["id"])
    except Refused:
        context.events.close(queue)
        raise
    return _stream(context.events.stream(queue, [("job", found)], until=FINISHED))


def _stream(texts: Any) -> Response:
    headers = {"x-accel-buffering": "no", "cache-control": "no-store"}
    return StreamingResponse(texts, media_type="text/event-stream", headers=headers)


async def images(context: Context, request: Request) -> Response:
    """The gallery, newest first; `before` an image's id gives older ones."""
    before, limit = request.query_params.get("before"), request.query_params.get("limit", str(PAGE))
    require(before is None or bool(ID.fullmatch(before)), "expected an image's id", "before")
    require(limit.isdigit() and len(limit) < 4 and 0 < int(limit) <= 200, "expected a number from 1 to 200", "limit")
    found = await context.thread(context.store.images, int(limit), before)
    return JSONResponse({"images": found, "more": len(found) == int(limit)})


async def image(context: Context, request: Request) -> Response:
    """An image's settings."""
    found = await context.thread(context.store.image, request.path_params["id"])
    if found is None:
        raise Refused(404, NO_SUCH)
    return JSONResponse(found)


async def delete(context: Context, request: Request) -> Response:
    """Delete an image of the gallery, its file included."""
    id = request.path_params["id"]
    if not await context.thread(context.store.delete_image, id):
        raise Refused(404, NO_SUCH)
    context.events.publish("deleted", {"id": "", "image": id})
    return JSONResponse({"id": id, "deleted": True})


async def image_file(context: Context, request: Request) -> Response:
    """An image's PNG; `?download` saves it under its prompt. Ranges are not served."""
    name = request.path_params["name"]
    id = name.removesuffix(".png")
    data = await context.thread(context.store.image_bytes, id) if name.endswith(".png") else None
    if data is None:
        raise Refused(404, NO_SUCH)
    headers = {"cache-control": "private, max-age=86400"}
    if "download" in request.query_params:
        found = context.store.image(id) or {"metadata": {}}
        seed = found["metadata"].get("seed")
        file = slug(str(found["metadata"].get("prompt", "")))[:40] + ("" if seed is None else f"-{int(seed)}")
        headers["content-disposition"] = f'attachment; filename="{file}.png"'
    return Response(data, media_type="image/png", headers=headers)


async def read(context: Context, request: Request) -> Response:
    """The settings of an image that is given as base64: what can be drawn again, and notes on what cannot."""
    given = await read_json(request)
    data = decode_base64(given.get("image"), "image")
    found = await context.thread(metadata_of, data)
    fields, notes = await asyncio.to_thread(restored, found, context)
    return JSONResponse({"fields": fields, "notes": notes, "parameters": found.parameters})


def metadata_of(data: bytes) -> Metadata:
    """What an image's file says of how it was made. Raises ConfigError where it is no image."""
    opened(data, "image")
    return read_metadata(io.BytesIO(data))  # type: ignore[arg-type]


def restored(found: Metadata, context: Context) -> tuple[dict[str, Any], list[str]]:
    """(fields of a request, notes) from an image's metadata. No file that the metadata names is looked for."""
    if found.ldm:
        return _of_ours(found.ldm, context)
    if is_json(found.parameters) or not found.parameters.strip():
        text = read_foreign({"parameters": found.parameters, **found.others})
    else:
        text = read_infotext(found.parameters)
    if text is None:
        raise ConfigError("the image says nothing of how it was made", where="image")
    settings, notes, source = a1111_settings(text, Path(), Changes({}, frozenset()))
    model = source.get("model")
    here = model if model in context.catalog.models else context.catalog.default
    settings, more = fit_spacing(settings, str(source["program"]), context.catalog.info(here).schedule)
    notes += more
    fields = {name: _listed(value) for name, value in settings.items() if name in RESTORED}
    if model in context.catalog.models:
        fields["model"] = model
    elif model:
        notes.append(f"it was drawn by {str(model)[:80]}, which is not here")
    return fields, notes


def _of_ours(ldm: Mapping[str, Any], context: Context) -> tuple[dict[str, Any], list[str]]:
    fields = {name: value for name, value in ldm.items() if name in RESTORED and value is not None}
    notes = []
    if any(name in fields for name in ("timesteps", "sigmas")):
        fields = {name: value for name, value in fields.items() if name not in ("num_inference_steps", "spacing")}
    if ldm.get("model") in context.catalog.models:
        fields["model"] = ldm["model"]
    elif ldm.get("model"):
        notes.append(f"it was drawn by {str(ldm['model'])[:80]}, which is not here")
    _add_vae(fields, notes, ldm, context.catalog)
    model = fields.get("model", context.catalog.default)
    if context.catalog.info(model).schedule.is_flow:
        fields.pop("spacing", None)
    if "model" in fields:
        given = (context.catalog.parts(model).get("text_encoders", ()), _names(ldm.get("text_encoders")))
        now, then = (", ".join(map(_file_name, names)) or "none beside the model" for names in given)
        notes += [f"it was drawn with other text encoders: {then}, not {now}"] if then != now else []
    loras = ldm.get("lora") if isinstance(ldm.get("lora"), list) else []
    for lora in loras[: limits.MAX_LORAS]:
        name, weight = (lora.get("name"), lora.get("weight")) if isinstance(lora, Mapping) else (None, None)
        if name in context.catalog.loras:
            fields.setdefault("lora", []).append([name, weight])
            if "text_weight" in lora:
                notes.append(f"{name} had the weight {lora['text_weight']} in the text encoder: write it as a tag")
        else:
            notes.append(f"the LoRA {str(name)[:80]} is not here")
    if ldm.get("image_sha256"):
        notes.append("the image that it began at is not in the file")
        fields = {name: value for name, value in fields.items() if name not in ("strength", "outpaint")}
    return fields, notes


def _add_vae(fields: dict[str, Any], notes: list[str], ldm: Mapping[str, Any], catalog: Catalog) -> None:
    """Add the VAE that stood in place of the model's own, or a note."""
    for file in map(_file_name, _names(ldm.get("vae"))):
        name = next((name for name in (file, Path(file).stem) if name in catalog.vaes), None)
        if name is None:
            notes.append(f"the VAE {file} is not here")
        else:
            fields["vae"] = name


def _names(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) else value[:8] if isinstance(value, list) else []


def _file_name(path: Any) -> str:
    return Path(str(path)).name[:80]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
