"""Prompt files to images: read (prompts), resolved (jobs), drawn (drawing), written down (output).

Rooms from bottom to top: prompts, jobs, output, replay, sheets, drawing; each imports only from those before it.

This package is callable, since it has the name of its function: `ldm.render(prompts, output)` is runner.render.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.render.drawing.runner import Rendered


class _Render(types.ModuleType):
    def __call__(self, *args: Any, **settings: Any) -> Rendered:
        """See ldm.render.drawing.runner.render."""
        from ldm.render.drawing.runner import render

        return render(*args, **settings)


sys.modules[__name__].__class__ = _Render
