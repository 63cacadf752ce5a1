"""KEY=VALUE settings on the command line of `ldm train`, `finetune` and `distill`."""

from __future__ import annotations

import os
from collections.abc import Sequence


def sorted_out(
    first: str | None, overrides: Sequence[str], resume: str | None
) -> tuple[str | None, list[str], str | None]:
    """(first, overrides, resume) as they were meant: argparse takes a setting for the first word, or for a checkpoint.

    `first` may be left out, so that a KEY=VALUE which is no path stands in its place; `--resume steps=9` is the
    latest checkpoint and a setting.
    """
    settings = list(overrides)
    if first is not None and "=" in first and not os.path.exists(first):
        first, settings = None, [first, *settings]
    if resume is not None and "=" in resume:
        settings, resume = [*settings, resume], "latest"
    return first, settings, resume
