"""What the routes share: strict JSON in, JSON and errors out, and calls that wait for their images."""

from __future__ import annotations

import asyncio
import functools
import json
import traceback
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ldm import console
from ldm.errors import ConfigError, LdmError, NumericsError, ResourceError
from ldm.web.catalog import Catalog
from ldm.web.events import Events
from ldm.web.jobs import Job, Queue
from ldm.web.limits import Refused
from ldm.web.request import Reader, public
from ldm.web.store import Store

POLL = 0.2  # seconds between looks whether a waiting client is still there
DEEPEST = 16  # lists and mappings inside each other in a request


@dataclass
class Context:
    """The parts of a server that its routes work with."""

    catalog: Catalog
    store: Store
    reader: Reader
    queue: Queue
    events: Events
    version: str
    token: bool
    debug: bool = False
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "ldm-web"))

    async def thread(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)` beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *args)


Route = Callable[[Context, Request], Awaitable[Response]]
Shape = Callable[[int, str, str | None], dict[str, Any]]  # an error's JSON, from its status, text and field


def plain_error(status: int, text: str, where: str | None) -> dict[str, Any]:
    """The JSON of an error in our own API and in A1111's."""
    return {"error": text, "detail": text, "field": where}


def answering(context: Context, route: Route, shape: Shape = plain_error) -> Callable[[Request], Awaitable[Response]]:
    """A route for Starlette: its errors become answers, without paths, tracebacks or environment."""

    @functools.wraps(route)
    async def endpoint(request: Request) -> Response:
        try:
            return await route(context, request)
        except LdmError as error:
            where = error.where if isinstance(error.where, str) and "/" not in error.where else None
            return JSONResponse(shape(_status(error), public(error), where), _status(error))
        except Exception as error:
            if context.debug:
                traceback.print_exc()
            console.warn(f"{request.method} {request.url.path}: internal error: {type(error).__name__}")
            return JSONResponse(shape(500, "internal error (a bug; the server's --debug shows where)", None), 500)

    return endpoint


def _status(error: LdmError) -> int:
    if isinstance(error, Refused):
        return error.status
    return 507 if isinstance(error, ResourceError) else 500 if isinstance(error, NumericsError) else 422


async def read_json(request: Request, empty: bool = False) -> dict[str, Any]:
    """The object of a request's body. Raises Refused(400) for anything else, NaN and deep nesting included."""
    body = await request.body()
    if not body and empty:
        return {}
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(value, dict):
        raise Refused(400, "expected a JSON object")
    if not _is_shallow(value, DEEPEST):
        raise Refused(400, "the JSON is nested too deeply")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _is_shallow(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_shallow(one, depth - 1) for one in inner)


def client_of(request: Request) -> tuple[str, str]:
    """(who the queue is fair to, the address): a page names itself by X-Client, other programs are their address."""
    address = request.client.host if request.client else "unknown"
    return f"{address} {request.headers.get('x-client', '')[:40]}", address


async def draw(context: Context, request: Request, fields: Mapping[str, Any], keep: bool = False) -> Job:
    """Draw a request and wait for it; where the client goes away before, the job is stopped.

    Raises LdmError where it failed: ConfigError before it waits, Refused(500) while it is drawn.
    """
    checked = await context.thread(context.reader.read, fields)
    loop, finished = asyncio.get_running_loop(), asyncio.Event()

    def on_finish() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(finished.set)

    job = context.queue.submit(checked, *client_of(request), keep=keep, on_finish=on_finish)
    try:
        while not finished.is_set():
            try:
                await asyncio.wait_for(finished.wait(), POLL)
            except TimeoutError:
                if await request.is_disconnected():
                    raise Refused(499, "the client is gone") from None
    finally:
        if not job.finished.is_set():
            context.queue.stop(job.id)
    if job.state == "failed":
        raise Refused(500, job.error or "failed")
    if job.state == "queued":
        raise Refused(503, "the server is ending")
    return job


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, tuple], hints: Mapping[str, str]) -> None:
    """Raise ConfigError for a field whose value is none of those in `known` that change nothing."""
    for name, value in given.items():
        if name in known and not any(type(value) is type(item) and value == item for item in known[name]):
            hint = hints.get(name, "leave it out")
            raise ConfigError(f"{value!r:.60} is not supported", where=name, hint=hint)
