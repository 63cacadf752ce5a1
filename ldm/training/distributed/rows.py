"""Which rows of a batch a process takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class RowShard(NamedTuple):
    """The rows of a whole batch that this process takes.

    If there are fewer rows than processes, some take row 0 with weight 0, because all have to take the step.
    """

    size: int  # rows of the whole batch
    rows: tuple[int, ...] | None = None  # None: all of them
    weight: float = 1.0  # of the mean over these rows in the mean over the processes

    @property
    def own(self) -> tuple[int, ...]:
        """The rows that count."""
        return tuple(range(self.size)) if self.rows is None else self.rows if self.weight else ()

    def repeated(self, count: int) -> RowShard:
        """The shard of a batch that has each row `count` times, one after the other."""
        rows = None if self.rows is None else tuple(row * count + i for row in self.rows for i in range(count))
        return RowShard(self.size * count, rows, self.weight)

    def of(self, values: Tensor) -> Tensor:
        """These rows (len(rows), …) of what was made for the whole batch (size, …)."""
        return values if self.rows is None else values[list(self.rows)]

    def mean(self, losses: Tensor) -> Tensor:
        """(len(rows),) losses -> a scalar; its mean over the processes is the mean loss of the whole batch."""
        return losses.mean() if self.rows is None else self.weight * losses.mean()


def rows_of(size: int, rows: Iterable[int], world: int) -> RowShard:
    """The shard of these rows of a batch of `size`; the other rows go to the other `world` - 1 processes."""
    rows = tuple(rows)
    if world == 1:
        return RowShard(size)
    return RowShard(size, rows, world * len(rows) / size) if rows else RowShard(size, (0,), 0.0)
