"""A description of the HTTP APIs: /openapi.json for programs, /docs for people."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import ldm
from ldm.files import format_bytes
from ldm.pipeline.keywords import ALIASES
from ldm.web import api, limits, openai, sdapi, sdapi_fields
from ldm.web.request import AXES, OFFERED

TEXT, NUMBER, WHOLE, FLAG = {"type": "string"}, {"type": "number"}, {"type": "integer"}, {"type": "boolean"}
LIST, OBJECT, ANY = {"type": "array", "items": {}}, {"type": "object"}, {}
IMAGE = {
    "type": "string",
    "description": "base64 of a PNG, JPEG or WebP, or a data: URL of one; other URLs are refused",
}
TYPES: dict[str, dict] = {
    **dict.fromkeys(("prompt", "negative_prompt", "model", "vae", "sampler", "spacing", "guidance", "emphasis"), TEXT),
    **dict.fromkeys(("num_images", "num_inference_steps", "height", "width", "clip_skip", "hires_steps"), WHOLE),
    "true_cfg_scale": NUMBER,
    "step_cache": WHOLE,
    **dict.fromkeys(("guidance_scale", "eta", "strength", "hires_scale", "hires_strength", "guidance_rescale"), NUMBER),
    "seed": {**ANY, "description": "a number, or one for each image; -1 or nothing draws one"},
    "lora": {**LIST, "description": "names, or pairs of a name and a weight"},
    "image": {**IMAGE, "description": f'{IMAGE["description"]}; or {{"id": …}} of the gallery'},
    "mask_image": IMAGE,
    "outpaint": {**OBJECT, "description": "pixels at left, right, top, bottom"},
    "grid": {**LIST, "description": f'axes such as "steps=4,8,16"; of {", ".join(AXES)}'},
    "strict": FLAG,
}
PROMPTS = {"prompt": TEXT, "negative_prompt": TEXT, "model": TEXT}
SDAPI: dict[str, dict] = {
    **dict.fromkeys(("prompt", "negative_prompt", "sampler_name", "sampler_index", "scheduler"), TEXT),
    **dict.fromkeys(("seed", "subseed", "steps", "width", "height", "batch_size", "n_iter"), WHOLE),
    **dict.fromkeys(("subseed_strength", "cfg_scale", "eta"), NUMBER),
    "override_settings": {**OBJECT, "description": ", ".join(sdapi_fields.OPTIONS)},
    **dict.fromkeys(("save_images", "send_images"), FLAG),
}
TXT2IMG = {"enable_hr": FLAG, "hr_scale": NUMBER, "hr_second_pass_steps": WHOLE, "denoising_strength": NUMBER}
IMG2IMG = {"init_images": LIST, "mask": IMAGE, "denoising_strength": NUMBER, "inpainting_mask_invert": WHOLE}
OPENAI = {"prompt": TEXT, "model": TEXT, "n": WHOLE, "size": TEXT, "response_format": TEXT, "output_format": TEXT}
OPENAI["seed"] = WHOLE
FILE = {"type": "string", "format": "binary"}

# (path, method, the function that answers, its fields)
OPERATIONS: tuple[tuple[str, str, Any, dict[str, dict] | None], ...] = (
    ("/api/info", "get", api.info, None),
    ("/api/prompt", "post", api.prompt, PROMPTS),
    ("/api/read", "post", api.read, {"image": IMAGE}),
    ("/api/jobs", "post", api.submit, {name: TYPES.get(name, ANY) for name in OFFERED}),
    ("/api/jobs", "get", api.jobs, None),
    ("/api/jobs", "delete", api.stop_all, None),
    ("/api/jobs/{id}", "get", api.job, None),
    ("/api/jobs/{id}", "delete", api.stop, None),
    ("/api/jobs/{id}/events", "get", api.job_events, None),
    ("/api/events", "get", api.events, None),
    ("/api/images", "get", api.images, None),
    ("/api/images/{id}", "get", api.image, None),
    ("/api/images/{id}", "delete", api.delete, None),
    ("/images/{name}", "get", api.image_file, None),
    ("/sdapi/v1/txt2img", "post", sdapi.txt2img, {**SDAPI, **TXT2IMG}),
    ("/sdapi/v1/img2img", "post", sdapi.img2img, {**SDAPI, **IMG2IMG}),
    ("/sdapi/v1/options", "get", sdapi.options, None),
    ("/sdapi/v1/options", "post", sdapi.set_options, {}),
    ("/sdapi/v1/samplers", "get", sdapi.samplers, None),
    ("/sdapi/v1/schedulers", "get", sdapi.schedulers, None),
    ("/sdapi/v1/sd-models", "get", sdapi.sd_models, None),
    ("/sdapi/v1/sd-vae", "get", sdapi.sd_vae, None),
    ("/sdapi/v1/loras", "get", sdapi.loras, None),
    ("/sdapi/v1/progress", "get", sdapi.progress, None),
    ("/sdapi/v1/interrupt", "post", sdapi.interrupt, None),
    ("/sdapi/v1/png-info", "post", sdapi.png_info, {"image": IMAGE}),
    ("/v1/images/generations", "post", openai.generations, OPENAI),
    ("/v1/images/edits", "post", openai.edits, {**OPENAI, "image": FILE, "mask": FILE}),
    ("/v1/models", "get", openai.models, None),
)
NOTES = (
    "What a request does not say is the model's own default. Unknown fields are refused with the nearest name.",
    f"A request holds {format_bytes(limits.MAX_BODY)} at most, with images {format_bytes(limits.MAX_UPLOAD)}; "
    f"{limits.MAX_QUEUED} jobs may wait. Beyond that the answer is 413 or 429.",
    "Calls of /sdapi and /v1 wait for their images and end with their client; jobs of /api/jobs outlive it. Images of "
    "calls are not kept in the gallery unless they say save_images (A1111) or response_format url (OpenAI).",
    f"A1111's fields that change nothing here: {', '.join(sdapi_fields.IGNORED)}. Refused unless they hold what "
    f"changes nothing: {', '.join(sdapi_fields.NEUTRAL)}.",
    f"OpenAI's field that changes nothing here: user. Refused unless they hold a default: {', '.join(openai.NEUTRAL)}. "
    "Both generations and edits take the fields of /api/jobs too.",
    "/api/jobs takes these words as well: "
    f"{', '.join(f'{word} = {name}' for word, name in ALIASES.items() if name in OFFERED)}.",
)


def description() -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, dict] = {}
    for path, method, function, fields in OPERATIONS:
        operation: dict[str, Any] = {"summary": (function.__doc__ or "").split("\n")[0]}
        operation["responses"] = {"200": {"description": "done"}, "4XX": {"description": "refused"}}
        parts = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        operation["parameters"] = [{"name": n, "in": "path", "required": True, "schema": TEXT} for n in parts]
        if fields is not None:
            kind = "multipart/form-data" if path in ("/v1/images/edits",) else "application/json"
            schema = {"type": "object", "properties": fields}
            operation["requestBody"] = {"content": {kind: {"schema": schema}}}
        paths.setdefault(path, {})[method] = operation
    about = {"title": "ldm web", "version": ldm.__version__, "description": "\n\n".join(NOTES)}
    token = {"token": {"type": "http", "scheme": "bearer"}}
    return {"openapi": "3.1.0", "info": about, "paths": paths, "components": {"securitySchemes": token}}


def page() -> str:
    """The same for people, with the page's own style sheet."""
    body = ["<h1>HTTP APIs</h1>", *(f"<p>{escape(note)}</p>" for note in NOTES)]
    body.append('<p><a href="/">The page</a> · <a href="/openapi.json">openapi.json</a></p>')
    for path, method, function, fields in OPERATIONS:
        text = escape((function.__doc__ or "").split("\n")[0])
        body.append(f'<section><h2><span class="method">{method.upper()}</span> <code>{escape(path)}</code></h2>')
        body.append(f"<p>{text}</p>")
        if fields:
            rows = (f"<tr><th><code>{escape(n)}</code></th><td>{escape(_kind(s))}</td></tr>" for n, s in fields.items())
            body.append(f"<details><summary>{len(fields)} fields</summary><table>{''.join(rows)}</table></details>")
        body.append("</section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>ldm web: HTTP APIs</title>'
    head += '<link rel="stylesheet" href="/static/style.css">'
    text = "\n".join(body)
    return f'<!doctype html><html lang="en"><head>{head}</head><body class="docs"><main>{text}</main></body></html>'


def _kind(schema: dict[str, Any]) -> str:
    return ": ".join(str(schema[name]) for name in ("type", "description") if name in schema)


def routes() -> list[Route]:
    """The routes of both."""
    document, html = description(), page()

    async def as_json(request: Request) -> Response:
        return JSONResponse(document)

    async def as_html(request: Request) -> Response:
        return HTMLResponse(html)

    return [Route("/openapi.json", as_json), Route("/docs", as_html)]
