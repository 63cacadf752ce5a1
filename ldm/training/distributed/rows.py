"""Which rows of a batch a process takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class RowShard(NamedTuple):
    """The rows of a whole batch that this process takes.

    Where there are fewer rows than processes some take a first row that counts for nothing: all have to take the step.
    """

    size: int  # rows of the whole batch
    rows: tuple[int, ...] | None = None  # None: all of them
    weight: float = 1.0  # of the mean over these rows in the mean over the processes

    @property
    def own(self) -> tuple[int, ...]:
        """The rows that count."""
        return tuple(range(self.size)) if self.rows is None else self.rows if self.weight else ()

    def of(self, values: Tensor) -> Tensor:
        """These rows (len(rows), …) of what was made for the whole batch (size, …)."""
        return values if self.rows is None else values[list(self.rows)]

    def mean(self, losses: Tensor) -> Tensor:
        """Of these rows' losses (len(rows),) a scalar whose mean over the processes is that of the whole batch."""
        return losses.mean() if self.rows is None else self.weight * losses.mean()


def rows_of(size: int, rows: Iterable[int], world: int) -> RowShard:
    """These rows of `size`, of which every other one is taken by another of `world` processes."""
    rows = tuple(rows)
    if world == 1:
        return RowShard(size)
    return RowShard(size, rows, world * len(rows) / size) if rows else RowShard(size, (0,), 0.0)
