"""Connections to other machines: each is told with -v, and refused with --offline.

Python's audit events see every socket that a library opens. A hook cannot be removed, so it is set once a process and
looks at `_state`.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import Any

from ldm import console

_state = {"set": False, "watching": False, "offline": False, "host": ""}


class Offline(OSError):
    """A connection that --offline does not allow: libraries take it for a network that is not there."""


def watch(offline: bool) -> None:
    """From now on tell of connections (console's level decides), and refuse them if `offline`."""
    _state.update(watching=True, offline=offline)
    if not _state["set"]:
        _state["set"] = True
        sys.addaudithook(_hook)


def rest() -> None:
    """Neither tell nor refuse any more."""
    _state.update(watching=False, offline=False)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or not _state["watching"]:
        return
    if event == "socket.getaddrinfo":
        _state["host"] = str(args[0] or "")
        if _state["offline"] and not is_local(_state["host"]):
            raise Offline(f"--offline: {_state['host']} is not looked up")
    elif event == "socket.connect":
        address = args[1]
        if not isinstance(address, tuple) or is_local(str(address[0])):
            return
        if _state["offline"]:
            raise Offline(f"--offline: no connection to {address[0]}:{address[1]}")
        name = f" ({_state['host']})" if _state["host"] not in ("", address[0]) else ""
        console.say(f"connects to {address[0]}:{address[1]}{name}", verbosity=1)


def is_local(host: str) -> bool:
    """Whether an address or a name is this machine's own."""
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:  # a name
        return False
