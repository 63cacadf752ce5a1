"""One call of `ldm.render`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm.render.jobs.jobs import Shard
from ldm.render.prompts.entry import Prompts
from ldm.render.prompts.templates import Wildcards

if TYPE_CHECKING:
    from ldm.pipeline.result import Target
    from ldm.render.jobs.resolve import Resolver


@dataclass(frozen=True)
class Run:
    """One call of `render`, checked."""

    prompts: Prompts
    target: Target
    defaults: Mapping[str, Any]
    resolver: Resolver
    wildcards: Wildcards | None
    seed: int
    shard: Shard
    batch_size: int | None
    metadata: bool
    ray: str | None = None  # the address of a cluster
