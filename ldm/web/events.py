"""What happens, told to those who listen: server-sent events from the thread that draws to open connections."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from ldm.web.limits import MAX_STREAMS, Refused

HEARTBEAT = 15  # seconds between comments on an idle stream, so that a connection that is gone is noticed
WAITING = 64  # events that a slow reader may be behind; then the oldest go


class Events:
    """`publish` from any thread, `stream` in the event loop."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: dict[asyncio.Queue[tuple[str, dict]], str | None] = {}

    def begin(self) -> None:
        """Bind to the running loop."""
        self._loop = asyncio.get_running_loop()

    @property
    def heard(self) -> bool:
        """Whether anybody listens: previews are made for listeners alone."""
        return bool(self._listeners)

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        if self._loop is not None and self._listeners and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._put, kind, data)

    def _put(self, kind: str, data: dict[str, Any]) -> None:
        for queue, job in self._listeners.items():
            if job is None or job == data.get("id"):
                while queue.full():
                    queue.get_nowait()
                queue.put_nowait((kind, data))

    def open(self, job: str | None = None) -> asyncio.Queue[tuple[str, dict]]:
        """A listener's queue, of one job's events or all. Raises Refused(429) where too many listen."""
        if len(self._listeners) >= MAX_STREAMS:
            raise Refused(429, "too many event streams are open")
        queue: asyncio.Queue[tuple[str, dict]] = asyncio.Queue(WAITING)
        self._listeners[queue] = job
        return queue

    def close(self, queue: asyncio.Queue) -> None:
        self._listeners.pop(queue, None)

    async def stream(
        self, queue: asyncio.Queue, first: list[tuple[str, dict]], until: tuple[str, ...] = ()
    ) -> AsyncIterator[str]:
        """`first`, then what is published, as text of an event stream; ends behind a "job" event in one of `until`."""
        try:
            for kind, data in first:
                yield _text(kind, data)
                if data.get("state") in until:
                    return
            while True:
                try:
                    kind, data = await asyncio.wait_for(queue.get(), HEARTBEAT)
                except TimeoutError:
                    yield ": still here\n\n"
                    continue
                yield _text(kind, data)
                if kind == "job" and data.get("state") in until:
                    return
        finally:
            self.close(queue)


def _text(kind: str, data: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"  # JSON has no line breaks of its own
