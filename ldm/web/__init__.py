"""`ldm web`: a page and HTTP APIs for drawing images, on this machine alone.

This package is callable, since it has the name of its function: `ldm.web(model="default")` is server.web. The libraries
that it needs come with the extra `web`; importing this package imports none of them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

from ldm.errors import ConfigError

if TYPE_CHECKING:
    from ldm.web.server import Served

NEEDED = ("starlette", "uvicorn", "python_multipart")


def web(*args: Any, **settings: Any) -> Served | None:
    """See ldm.web.server.web. Raises ConfigError where the extra `web` is not installed."""
    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"ldm web needs {', '.join(missing)}", hint="pip install 'ldm-pipeline[web]'")
    from ldm.web.server import web as serve

    return serve(*args, **settings)


class _Web(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Served | None:
        """See ldm.web.server.web."""
        return web(*args, **settings)


sys.modules[__name__].__class__ = _Web
