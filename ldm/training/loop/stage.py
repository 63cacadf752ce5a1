"""What the loop asks of a stage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn


class Stage(Protocol):
    """What a stage adds to the loop. `batches` can start at any step and depends on (settings, step) alone.

    Parameters of `module` that are not trained do not require a gradient. A stage may also have `lines` about its data
    (the run's page shows them), `inputs`, the digests of what it reads by name, and `tensors`, a state of its own that
    checkpoints keep. One with `follow` is given the average before the first step. A batch may have `ids`. With several
    processes `batches` gives each its rows (see distributed.RowShard), and `loss` is their mean.
    """

    module: nn.Module

    def batches(self, first_step: int) -> Iterator[Any]: ...  # accumulation × steps of them

    def loss(self, batch: Any, step: int, micro: int) -> Tensor: ...  # scalar fp32

    def validate(self, ema: nn.Module, step: int) -> dict[str, float]: ...

    def sample_grid(self, ema: nn.Module): ...  # PIL image of samples, or None

    def export(self, ema: nn.Module, folder: Path, scores: dict[str, float]) -> Path: ...  # what was written
