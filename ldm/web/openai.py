"""OpenAI's image API, for its clients: /v1/images/generations, /v1/images/edits, /v1/models.

Beside OpenAI's own fields a request may hold ours (`extra_body={"seed": 7}` in the Python client). What is not given is
the model's own default.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ldm.errors import ConfigError, require
from ldm.images import encode, file_format
from ldm.web import limits
from ldm.web.http import Context, answering, draw, read_json, refuse_unknown
from ldm.web.jobs import Job
from ldm.web.limits import Refused
from ldm.web.request import opened
from ldm.web.sdapi import finished_images

MAX_N = 10
IGNORED = ("user",)
NEUTRAL: dict[str, tuple] = {
    "quality": (None, "auto", "standard"),
    "style": (None, "vivid", "natural"),
    "background": (None, "auto", "opaque"),
    "moderation": (None, "auto", "low"),
    "stream": (None, False),
    "partial_images": (None, 0),
    "output_compression": (None, 100),
    "input_fidelity": (None, "low"),
}
OWN = ("response_format", "output_format", "size", "n", "model")
NUMBERS = ("seed", "steps", "num_inference_steps", "guidance_scale", "strength")  # of a form, whose values are texts


def error_shape(status: int, text: str, where: str | None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": text, "type": kind, "param": where, "code": None}}


def routes(context: Context) -> list[Route]:
    """The routes of /v1."""

    def at(path: str, route: Any, method: str) -> Route:
        return Route(path, answering(context, route, error_shape), methods=[method])

    return [
        at("/v1/images/generations", generations, "POST"),
        at("/v1/images/edits", edits, "POST"),
        at("/v1/models", models, "GET"),
    ]


async def models(context: Context, request: Request) -> Response:
    """The models that a request may name."""
    listed = [{"id": name, "object": "model", "created": 0, "owned_by": "ldm"} for name in context.catalog.models]
    return JSONResponse({"object": "list", "data": listed})


async def generations(context: Context, request: Request) -> Response:
    """Draw images of a prompt."""
    given = await read_json(request)
    for name in ("image", "mask_image", "mask", "init_image", "grid"):
        require(name not in given, "is not a field of this call", name)
    return await _draw(context, request, given, fields_of(given))


async def edits(context: Context, request: Request) -> Response:
    """Draw an image anew: where a mask, or the image itself, is transparent; the whole image without either."""
    try:
        form = await request.form(max_files=2, max_fields=40, max_part_size=limits.MAX_BODY)
    except (MultiPartException, ValueError):
        raise Refused(400, "the form cannot be read") from None
    async with _closing(form):
        given: dict[str, Any] = {}
        files: dict[str, bytes] = {}
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            require(name not in given and name not in files, "is given twice", name[:80])
            if isinstance(value, UploadFile):
                require(name in ("image", "mask"), "is not a file of this call", name[:80])
                files[name] = await value.read()
            else:
                require(name not in ("image", "mask"), "expected a file", name)
                given[name] = _number(name, value)
    require("image" in files, "an image is needed", "image")
    fields = fields_of(given)
    fields |= await context.thread(_sources, files)
    return await _draw(context, request, given, fields)


class _closing:
    def __init__(self, form: Any):
        self._form = form

    async def __aenter__(self) -> Any:
        return self._form

    async def __aexit__(self, *_exc: Any) -> None:
        await self._form.close()


def _number(name: str, value: str) -> Any:
    """A form's text as the JSON that it stands for, where the field is a number or no text."""
    if name in ("n", "stream", "partial_images", "output_compression", *NUMBERS):
        try:
            return json.loads(value)
        except ValueError:
            raise ConfigError(f"expected a number, got {value!r:.40}", where=name) from None
    return value


def _sources(files: Mapping[str, bytes]) -> dict[str, str]:
    """The image, and as its mask what is fully transparent in the mask's file or else in the image."""
    image = opened(files["image"], "image")
    alpha = _transparent(files.get("mask", files["image"]))
    if "mask" in files:
        require(alpha is not None, "is transparent nowhere, so that nothing would be drawn", "mask")
    fields = {"image": _text(image)}
    if alpha is not None:
        require(alpha.size == image.size, "the mask has another size than the image", "mask")
        fields["mask_image"] = _text(alpha)
    return fields


def _transparent(data: bytes) -> Image.Image | None:
    """White where an image is fully transparent, black elsewhere; None where it is so nowhere."""
    import io

    opened(data, "mask")  # size and format are checked before all pixels are read
    with Image.open(io.BytesIO(data), formats=("PNG", "WEBP", "GIF")) if _may_be_clear(data) else _opaque() as image:
        alpha = image.convert("RGBA").getchannel("A").point(lambda value: 0 if value else 255)
    return alpha if alpha.getbbox() is not None else None


def _may_be_clear(data: bytes) -> bool:
    return data.startswith((b"\x89PNG", b"RIFF", b"GIF8"))


def _opaque() -> Image.Image:
    return Image.new("RGB", (1, 1))


def _text(image: Image.Image) -> str:
    return base64.b64encode(encode(image.convert("RGB"))).decode("ascii")


def fields_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A request in our words. Raises ConfigError."""
    refuse_unknown(given, NEUTRAL, {})
    fields = {k: v for k, v in given.items() if k not in (*NEUTRAL, *IGNORED, *OWN)}
    require(isinstance(fields.get("prompt"), str), "expected a text", "prompt")
    n = given.get("n")
    if n is not None:
        require(type(n) is int and 1 <= n <= MAX_N, f"expected a number from 1 to {MAX_N}", "n")
        fields["num_images"] = n
    size = given.get("size")
    if size not in (None, "auto"):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
        require(match is not None, 'expected "auto" or a size such as 512x512', "size")
        fields["width"], fields["height"] = map(int, match.groups())  # type: ignore[union-attr]
    if given.get("model") is not None:
        fields["model"] = given["model"]
    require(given.get("response_format") in (None, "b64_json", "url"), "expected b64_json or url", "response_format")
    if given.get("output_format") is not None:
        require(isinstance(given["output_format"], str), "expected a text", "output_format")
        file_format(given["output_format"])
    return fields


async def _draw(context: Context, request: Request, given: Mapping[str, Any], fields: dict[str, Any]) -> Response:
    by_url = given.get("response_format") == "url"
    format = file_format(given.get("output_format") or "png")
    require(not by_url or format == "png", "images at URLs are PNG", "output_format")
    job = await draw(context, request, fields, keep=by_url)
    if job.state == "cancelled":
        raise Refused(503, "the job was interrupted")
    if by_url:
        listed = [{"url": f"{request.base_url}images/{id}.png"} for id in job.images]
    else:
        encoded = await context.thread(_encoded, context, job, format)
        listed = [{"b64_json": base64.b64encode(data).decode("ascii")} for data in encoded]
    return JSONResponse({"created": int(time.time()), "data": listed})


def _encoded(context: Context, job: Job, format: str) -> list[bytes]:
    if format == "png":
        return [data for data, _ in finished_images(context, job)]
    return [encode(image, format) for image, _ in job.results]
