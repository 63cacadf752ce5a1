"""The processes of a run: one, or those that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ldm.training.distributed.alone import ALONE, Alone, current


@contextmanager
def processes() -> Iterator[Alone]:
    """The processes of this run, for a `with` block that each of them enters."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or current() is not ALONE:
        yield current()
        return
    from ldm.training.distributed.group import joined

    with joined() as group:
        yield group
