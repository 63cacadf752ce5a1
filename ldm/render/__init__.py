"""Prompt files -> images: read (parse), made into jobs (expand, jobs), drawn (runner), recorded (manifest).

This package is callable, since it has the name of its function: `ldm.render(prompts, output)` is runner.render.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.render.drawing.runner import Rendered


class _Render(types.ModuleType):
    def __call__(self, *args: Any, **words: Any) -> Rendered:
        """See ldm.render.drawing.runner.render."""
        from ldm.render.drawing.runner import render

        return render(*args, **words)


sys.modules[__name__].__class__ = _Render
