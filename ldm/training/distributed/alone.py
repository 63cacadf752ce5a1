"""A run of one process, and which run this process is in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from ldm.console import StopRequest
from ldm.errors import LdmError
from ldm.training.distributed.rows import RowShard

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")


class Alone:
    """A run of one process. `Many` has the same methods for several processes."""

    rank, world = 0, 1
    first = True  # writes and speaks
    sharded = False  # by FSDP2

    def part(self, size: int) -> RowShard:
        """The rows of a batch of `size` that this process takes: every world-th."""
        return RowShard(size)

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on the first process; all processes return its result (plain JSON) or raise its LdmError."""
        return work()

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every process, however long it takes. If one raises LdmError, all raise that error."""
        return work()

    def agreed(self, work: Callable[[], T]) -> T:
        """Like `on_all`, for short work that is done often."""
        return work()

    def from_first(self, value: bool) -> bool:
        """The value that the first process has."""
        return value

    def total(self, loss: Tensor) -> Tensor:
        """The mean of `loss` over the processes. The same exchange carries their signals."""
        return loss

    def whole(self, values: Tensor, part: RowShard) -> Tensor:
        """(rows, …) of each process -> (size, …) of the whole batch, the same numbers on all of them."""
        return values

    def any_of(self, flags: list[bool]) -> list[bool]:
        """For each flag, whether any process has set it."""
        return flags

    def gathered(self, texts: list[str]) -> list[str]:
        """The texts of all processes, for rare use."""
        return texts

    def listen(self, stop: StopRequest) -> None:
        """Take this process's signals from `stop`."""

    def hear(self) -> None:
        """Exchange the signals that any process has received."""

    def signal(self, stop: StopRequest) -> int | None:
        """The signal that stops the run."""
        return stop.signal

    def at_once(self, stop: StopRequest) -> AbstractContextManager[None]:
        """A block that a signal may interrupt, unless other processes wait for its result."""
        return stop.at_once()

    def of_all(self, error: LdmError) -> LdmError:
        """Mark an error that every process raises, so that only the first one prints it."""
        return error

    def failed(self, error: BaseException) -> BaseException:
        """The error to raise in place of one that ends the run on this process."""
        return error

    def leave(self) -> None:
        """Leave the group."""


ALONE = Alone()


_current: Alone = ALONE


def current() -> Alone:
    """The processes of the current run."""
    return _current


def set_current(group: Alone) -> None:
    """Make `group` the processes of the current run."""
    global _current
    _current = group


@contextmanager
def by_itself() -> Iterator[None]:
    """What one process does while the others wait for it: it has all rows, and asks nothing of the others."""
    before = _current
    set_current(ALONE)
    try:
        yield
    finally:
        set_current(before)
