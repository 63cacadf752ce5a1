"""Weights of samples by their measured error: what is learned badly counts more, and nothing less than a floor.

A sample's error is its loss relative to the mean loss at its noise level, averaged over the times it was seen. It is
kept in a table of fixed size by the hash of the sample's id, so that a set of any size has one; the table is a part of
the run's state. Several processes have the same table: each notes the losses of the whole batch, as one alone does.

Shapes:  B samples of a batch   b those of this process
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.training.distributed import RowShard, current
from ldm.training.loop.seeded import key

SLOTS, LEVELS = 1 << 16, 32
MEMORY = 0.1  # share of the newest value in a sample's error
LEVEL_MEMORY = 0.02  # the same in the mean loss of a noise level


class ErrorWeights:
    """`of` gives the weights of a batch, `seen` notes its losses; all processes call both, with their rows."""

    def __init__(self, floor: float):
        self.floor = floor
        self.errors = torch.ones(SLOTS)
        self.levels = torch.zeros(LEVELS)  # 0: nothing was seen there yet

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state, to save and to restore in place."""
        return {"errors": self.errors, "levels": self.levels}

    def of(self, ids: Sequence[str], part: RowShard) -> Tensor:
        """(b,) weights on the CPU, each at least `floor` before their mean over the whole batch is made 1."""
        weights = self.errors[_slots(ids, part)].clamp(min=self.floor)
        return part.of(weights / weights.mean())

    def seen(self, ids: Sequence[str], losses: Tensor, u: Tensor, part: RowShard) -> None:
        """Note losses (b,) at noise levels u (B,) in [0, 1); those that are not finite are left out."""
        found = current().whole(losses.detach().float().cpu(), part).tolist()
        levels = (u * LEVELS).long().clamp(max=LEVELS - 1).tolist()
        for slot, loss, level in zip(_slots(ids, part).tolist(), found, levels):
            if not 0 <= loss < float("inf"):
                continue
            mean = float(self.levels[level]) or loss
            self.levels[level] = mean + LEVEL_MEMORY * (loss - mean)
            if mean > 0:
                self.errors[slot] += MEMORY * (loss / mean - float(self.errors[slot]))


def _slots(ids: Sequence[str], part: RowShard) -> Tensor:
    """(B,) places in the table, of the whole batch."""
    return current().whole(torch.tensor([key(id) % SLOTS for id in ids]), part)
