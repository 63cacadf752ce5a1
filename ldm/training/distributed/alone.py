"""A run of one process: which rows of a batch it takes, what it would ask of others, and the network that it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ldm.console import StopRequest
from ldm.errors import LdmError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.training.loop.stage import Stage


T = TypeVar("T")


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


# A network that one process trains, and tensors that may be sharded over several.

SHARDED = "full_tensor"  # what tells a DTensor without importing its module


class Single:
    """A network that one process trains."""

    def __init__(self, group: Alone = ALONE):
        self.group = group

    def loss(self, stage: Stage, batch: Any, step: int, micro: int) -> Tensor:
        """The stage's loss on this process's rows; its backward pass gives the gradients of all rows."""
        return stage.loss(batch, step, micro)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and a backward pass; gradients are exchanged in the `last` one of a step."""
        return nullcontext()

    def settle(self) -> None:
        """After forward passes that no backward pass followed."""

    def gathered(self, module: nn.Module) -> nn.Module:
        """`module` with all of its weights: on every process at once, of use on the first one."""
        return module


def is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a shard of it."""
    return any(hasattr(parameter, SHARDED) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, others unchanged. Every process has to call it."""
    return tensor.full_tensor() if hasattr(tensor, SHARDED) else tensor


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shards."""
    return [tensor.to_local() if hasattr(tensor, SHARDED) else tensor for tensor in tensors]
