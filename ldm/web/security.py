"""What every request passes before a route sees it: who asks, from which page, how much, and how fast.

The server trusts nothing but its own page and programs on this machine. A browser tells the truth about the page that
asks (Origin, Sec-Fetch-Site), so that pages of other origins are refused; a name that was made to point here (DNS
rebinding) is not among the hosts. No cookie is set or read, no header allows another origin to read an answer.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Iterable
from typing import Any

from ldm.files import format_bytes
from ldm.web.limits import BODY_SECONDS, DRAIN_SECONDS, MAX_BODY, MAX_DRAINED, MAX_HELD, MAX_UPLOAD

UPLOADS = ("/api/jobs", "/api/read", "/sdapi/v1/img2img", "/sdapi/v1/png-info", "/v1/images/edits")
MULTIPART = ("/v1/images/edits",)
OPEN = ("/", "/favicon.ico")  # without the token, as /static/: the page itself holds nothing
PAGE = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
PAGE += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
NOTHING = "default-src 'none'; frame-ancestors 'none'; sandbox"
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}


class Guard:
    """ASGI middleware.

    hosts  names that the Host header may hold beside literal addresses of this machine: "localhost" and --listen's
    token  what an Authorization header must hold, as Bearer or as a Basic password; None: nothing
    """

    def __init__(self, app: Any, hosts: Iterable[str] = ("localhost",), token: str | None = None, any_ip: bool = False):
        self._app, self._hosts, self._token, self._any_ip = app, frozenset(hosts), token, any_ip
        self._held = 0

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        length, limit = _content_length(scope), MAX_UPLOAD if scope["path"] in UPLOADS else MAX_BODY
        refusal = self._refusal(scope)
        if refusal is None and length is not None and length > limit:
            refusal = 413, f"the body is larger than {format_bytes(limit)}"
        if refusal is not None:
            if (length or 0) <= MAX_DRAINED:
                await _drain(receive)
            await _answer(send, *refusal)
            return
        reserved = limit if length is None and scope["method"] == "POST" else length or 0
        if self._held + reserved > MAX_HELD:
            await _answer(send, 503, "too many large requests at once")
            return
        self._held += reserved
        try:
            body = await _body(receive, limit)
        finally:
            self._held -= reserved
        if isinstance(body, int):
            await _drain(receive)
            await _answer(send, body, "the body is too large or came too slowly")
            return
        await self._app(scope, _replay(body, receive), _with_headers(send, scope["path"]))

    def _refusal(self, scope: dict) -> tuple[int, str] | None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            return 421, "this server does not answer under that name"
        origins = headers.get(b"origin", [])
        if len(origins) > 1 or (origins and origins[0] not in (b"http://" + hosts[0], b"https://" + hosts[0])):
            return 403, "pages of other origins may not use this server"
        site, mode = (headers.get(name, [b""])[-1] for name in (b"sec-fetch-site", b"sec-fetch-mode"))
        arrives = scope["path"] == "/" and scope["method"] == "GET" and mode == b"navigate"  # by a link to the page
        if site not in (b"", b"none", b"same-origin") and not arrives:
            return 403, "pages of other origins may not use this server"
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE") and (problem := self._type_problem(scope, headers)):
            return 415, problem
        if self._token is None or scope["path"] in OPEN or scope["path"].startswith("/static/"):
            return None
        given = headers.get(b"authorization", [])
        if len(given) != 1 or not _holds(given[0], self._token):
            return 401, "a token is needed: Authorization: Bearer TOKEN"
        return None

    def _is_ours(self, host: bytes) -> bool:
        """Whether a Host header names this server: a loopback address, a name of `hosts`, or with `any_ip` any literal
        address (no name can be bound to one)."""
        try:
            text = host.decode("ascii").lower()
        except UnicodeDecodeError:
            return False
        name, _, port = text.rpartition(":") if not text.endswith("]") else (text, "", "")
        if not name:
            name, port = text, ""
        if port and not port.isdigit():
            return False
        if name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self._any_ip or str(address) in ("127.0.0.1", "::1")

    def _type_problem(self, scope: dict, headers: dict[bytes, list[bytes]]) -> str | None:
        length = headers.get(b"content-length", [b"0"])[0]
        if length == b"0" and b"transfer-encoding" not in headers:
            return None
        kind = headers.get(b"content-type", [b""])[-1].split(b";")[0].strip().lower()
        if scope["path"] in MULTIPART:
            return None if kind == b"multipart/form-data" else "expected multipart/form-data"
        return None if kind == b"application/json" else "expected application/json"


def _holds(header: bytes, token: str) -> bool:
    """Whether an Authorization header holds the token: `Bearer TOKEN`, or `Basic` with it as the password."""
    kind, _, value = header.partition(b" ")
    value = value.strip()
    if kind.lower() == b"basic":
        try:
            value = base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != b"bearer":
        return False
    return hmac.compare_digest(value, token.encode())


def _content_length(scope: dict) -> int | None:
    for name, value in scope["headers"]:
        if name.lower() == b"content-length":
            return int(value) if value.isdigit() and len(value) < 16 else 1 << 62
    return None


async def _body(receive: Any, limit: int) -> bytes | int:
    """The whole body; 413 where it is longer than `limit`, 408 where it came too slowly or never ended."""
    chunks, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return 408
                chunks.append(message.get("body", b""))
                size += len(chunks[-1])
                if size > limit:
                    return 413
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        return 408


async def _drain(receive: Any) -> None:
    """Read on and forget, for a while: a client that is answered while it sends may see a reset and no answer."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            while size < MAX_DRAINED:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):  # the end of the body, or of the connection
                    return


def _replay(body: bytes, receive: Any) -> Any:
    """A `receive` that gives `body`, then what comes from the client (that it has gone)."""
    given = False

    async def again() -> dict:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _with_headers(send: Any, path: str) -> Any:
    async def sending(message: dict) -> None:
        if message["type"] == "http.response.start":
            headers = [(n, v) for n, v in message["headers"] if n.lower() not in (b"accept-ranges", b"server")]
            names = {name.lower() for name, _ in headers}
            page = path in ("/", "/docs")
            extra = {**HEADERS, "content-security-policy": PAGE if page else NOTHING, "cache-control": "no-store"}
            headers += [(n.encode(), v.encode()) for n, v in extra.items() if n.encode() not in names]
            message = {**message, "headers": headers}
        await send(message)

    return sending


async def _answer(send: Any, status: int, text: str) -> None:
    body = json.dumps({"error": text, "detail": text}).encode()
    headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
    headers += [*HEADERS.items(), ("content-security-policy", NOTHING), ("cache-control", "no-store")]
    if status == 401:
        headers.append(("www-authenticate", "Bearer"))
    pairs = [(name.encode(), value.encode()) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
