"""`ldm web`: the server's beginning and end."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import ldm
from ldm import console
from ldm.errors import ConfigError, require
from ldm.files import require_place
from ldm.web import api, openai, openapi, sdapi
from ldm.web.catalog import Catalog
from ldm.web.events import Events
from ldm.web.http import Context
from ldm.web.jobs import Queue
from ldm.web.request import Reader
from ldm.web.security import Guard
from ldm.web.store import Store

PORT = 7860  # where people look for such a page
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST_TOKEN = 16  # characters
GRACE, LAST = 2, 12  # seconds for open connections, then for the step that is being drawn
CONNECTIONS = 128
PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".png": "image/png"}


def web(
    output: str | os.PathLike = "images",
    *,
    model: Any = "default",
    vae: Any = (),
    lora: Any = (),
    lora_dir: str | os.PathLike | None = None,
    text_encoders: Any = (),
    prediction_type: str | None = None,
    port: int | None = None,
    listen: str = "127.0.0.1",
    token: str | None = None,
    host: Any = (),
    max_gb: float = 20.0,
    open_browser: bool = False,
    block: bool = True,
    debug: bool = False,
    **common: Any,
) -> Served | None:
    """Serve a page and HTTP APIs that draw images; see docs/web.md.

    output       folder of the gallery; one server at a time works in it
    model        or several, of which the first is used where a request names none; likewise vae, lora
    lora_dir     all LoRAs in this folder can be chosen, and named by <lora:name:0.8> in prompts
    text_encoders  what single files of SD3 and FLUX among the models lack of CLIP and T5; one without a VAE gets the
                 first of vae
    prediction_type  epsilon, v_prediction or sample, where the one model does not say it or says it wrongly
    port         7860, or a free one where that is taken; 0: a free one
    listen       an address of this machine; another than loopback needs a token of 16 characters or more
    host         names beside "localhost" under which the server may be asked for
    max_gb       images of the gallery, beyond which no job is taken
    block        False: return at once with an object that has `.url` and `.close()`
    common       device, dtype, offload, attention, allow_unapplied of Pipeline

    Raises ConfigError, ModelError and ResourceError before the server begins.
    """
    token = check_access(listen, token)
    require(0 < max_gb <= 1e6, f"{max_gb:g} is outside 0 to 1,000,000", "max_gb")
    models = [model] if isinstance(model, str | os.PathLike) or not isinstance(model, Sequence) else list(model)
    parts = _listed(vae), _listed(lora), lora_dir, _listed(text_encoders), prediction_type
    catalog = Catalog.of(models or ["default"], *parts)
    folder = Path(os.path.expanduser(output))
    require_place(folder)
    listening = _listening(listen, port)
    try:
        served = Served(catalog, folder, listening, token, [listen, *_listed(host)], max_gb, debug, common)
    except BaseException:
        listening.close()
        raise
    if open_browser and (sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY")):
        threading.Timer(0.5, webbrowser.open, [served.page]).start()
    if not block:
        served.begin()
        return served
    print(f"Listening on {served.page}", flush=True)
    console.level = min(console.level, -1)  # bars belong to the page
    served.run()
    return None


class Served:
    """A server: `run` until a signal, or `begin` in a thread and `close`."""

    def __init__(
        self,
        catalog: Catalog,
        folder: Path,
        listening: socket.socket,
        token: str | None,
        hosts: Sequence[str],
        max_gb: float,
        debug: bool,
        common: dict[str, Any],
    ):
        self._socket, self._token = listening, token
        address, port = listening.getsockname()[:2]
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        store = Store(folder, int(max_gb * 1e9))
        try:
            events, reader = Events(), Reader(catalog, store, common)
            queue = Queue(store, reader, events, debug)
            self.context = Context(catalog, store, reader, queue, events, ldm.__version__, token is not None, debug)
            app = Guard(build_app(self.context), {"localhost", *hosts}, token, any_ip=address not in LOOPBACK)
        except BaseException:
            store.close()
            raise
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level="error",
            access_log=False,
            ws="none",
            lifespan="on",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=10,
            limit_concurrency=CONNECTIONS,
            h11_max_incomplete_event_size=16384,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="ldm-web", daemon=True)

    @property
    def page(self) -> str:
        """The page's address; the token stands behind the #, which browsers keep to themselves."""
        return self.url if self._token is None else f"{self.url}/#token={self._token}"

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, which are raised again at the end, within GRACE + LAST seconds."""
        try:
            self._serve()
        finally:
            self._end()

    def begin(self) -> None:
        """Serve in a thread, and return when the server answers."""
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            threading.Event().wait(0.01)

    def close(self) -> None:
        """End what `begin` began."""
        self._server.should_exit = True
        self._thread.join(GRACE + LAST)
        self._end()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])

    def _end(self) -> None:
        ended = self.context.queue.close(LAST)
        self.context.threads.shutdown(wait=False, cancel_futures=True)
        if ended:
            self.context.store.close()
        elif threading.current_thread() is threading.main_thread() and not self._thread.ident:
            console.warn("the step that was being drawn is given up; its job goes on at the next start")
            os._exit(143)  # a thread inside torch cannot be ended


def build_app(context: Context) -> Starlette:
    """All routes."""
    files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in PAGE.iterdir() if path.suffix in TYPES}

    async def page(request: Request) -> Response:
        return _file(files, "index.html", "no-cache")

    async def static(request: Request) -> Response:
        return _file(files, request.path_params["name"], "no-cache")

    async def unknown(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        return JSONResponse({"error": "unknown", "detail": "Not Found"}, status)

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        context.events.begin()
        context.store.sweep_inputs()
        context.queue.start()
        yield

    routes = [Route("/", page), Route("/static/{name}", static), *openapi.routes(), *api.routes(context)]
    routes += [*sdapi.routes(context), *openai.routes(context)]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={404: unknown, 405: unknown})


def _file(files: dict[str, tuple[bytes, str]], name: str, cache: str) -> Response:
    if name not in files:
        return JSONResponse({"error": "unknown", "detail": "Not Found"}, 404)
    data, kind = files[name]
    return Response(data, media_type=kind, headers={"cache-control": cache})


def check_access(listen: str, token: str | None) -> str | None:
    """The token. Raises ConfigError where another address than loopback has none, or it is short."""
    require(isinstance(listen, str) and bool(listen), "expected an address", "listen")
    if token is None:
        if listen not in LOOPBACK:
            hint = 'add --token, for example --token "$(openssl rand -hex 16)"'
            raise ConfigError("whoever reaches this address could use the server", where="listen", hint=hint)
        return None
    plain = isinstance(token, str) and token.isascii() and token.isprintable() and " " not in token
    require(plain and len(token) >= LEAST_TOKEN, f"expected {LEAST_TOKEN} letters and digits or more", "token")
    return token


def _listed(value: Any) -> list[Any]:
    return [value] if isinstance(value, str | os.PathLike) else list(value or ())


def _listening(address: str, port: int | None) -> socket.socket:
    """A socket at the address. Raises ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for number in (PORT, 0) if port is None else (port,):
        try:
            return socket.create_server((address, number), family=family, backlog=CONNECTIONS)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    raise ConfigError(
        f"cannot be listened on ({reason})", where=f"{address}:{port or PORT}", hint="choose another --port"
    )
