"""The processes that share a run: which of them writes and speaks, what they agree on, and who is missing.

They are started by `torchrun` or `accelerate launch`, which say in RANK, WORLD_SIZE and LOCAL_RANK who is who.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ldm import console, errors
from ldm.console import SILENT, StopRequest
from ldm.errors import ConfigError, LdmError, ProcessGone, first_line
from ldm.training.distributed.heartbeat import Hearts
from ldm.training.distributed.rows import RowShard, rows_of

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)  # in which all have to come to what they do together; a step, a sample grid
PATIENCE = 15.0  # seconds without a sign of life after which a process that is waited for counts as gone
LOOK = 5.0  # seconds between two looks for such
BROKEN = 5.0  # seconds likewise where a connection is broken, so that one is gone for certain

LOST = ("gloo", "NCCL", "Timed out", "Broken pipe", "Connection")  # in what PyTorch says of a broken connection


class Alone:
    """The one process of a run. `Many` has the same methods, and means all processes by them."""

    rank, world = 0, 1
    first = True  # writes and speaks
    sharded = False  # by FSDP2

    def part(self, size: int) -> RowShard:
        """The rows of a batch of `size` that this process takes: every world-th."""
        return RowShard(size)

    def on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns (plain JSON) or raises (LdmError) on the first process; the others wait for it."""
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """`work` on every process, however long it takes; where it raises LdmError on one of them, all raise that."""
        return work()

    def agreed(self, work: Callable[[], T]) -> T:
        """As `together`, for what takes a moment and comes often."""
        return work()

    def as_first(self, value: bool) -> bool:
        """What the first process says."""
        return value

    def total(self, loss: Tensor) -> Tensor:
        """The mean over the processes; they hear of each other's signals too."""
        return loss

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Which of the flags are set on any process."""
        return flags

    def gathered(self, texts: list[str]) -> list[str]:
        """The texts of all processes: for what is rare."""
        return texts

    def listen(self, stop: StopRequest) -> None:
        """`stop` hears of this process's signals."""

    def hear(self) -> None:
        """Let all know of the signals that any of them has had."""

    def signal(self, stop: StopRequest) -> int | None:
        """The signal that stops the run."""
        return stop.signal

    def at_once(self, stop: StopRequest) -> AbstractContextManager[None]:
        """A block that a signal may end where it is: not where others wait for what comes of it."""
        return stop.at_once()

    def of_all(self, error: LdmError) -> LdmError:
        """An error that every process raises: the first one says it."""
        return error

    def failed(self, error: BaseException) -> BaseException:
        """What to raise in the place of an error that ends the run here."""
        return error

    def leave(self) -> None:
        """Part from the others."""


class Many(Alone):
    """One of several processes. Raises ConfigError where the environment does not say how they find each other."""

    def __init__(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each broken connection is a page of its stack
        import torch
        import torch.distributed as dist

        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
        if local < gpus:
            torch.cuda.set_device(local)
        try:
            self.store, self.rank, self.world = _meet()
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            what = f"is {os.environ['WORLD_SIZE']}, but the processes do not find each other ({first_line(error)})"
            raise ConfigError(what, where="WORLD_SIZE", todo="start them by torchrun, or unset it") from None
        self.first, self.level = self.rank == 0, max(console.level, SILENT + 1)
        self._dist, self._torch = dist, torch
        self._count, self._stop, self._signal = 0, None, None
        self.hearts = Hearts(self.store, self.rank, self.world)
        if not self.first:
            console.level = SILENT

    def part(self, size: int) -> RowShard:
        return rows_of(size, range(self.rank, size, self.world), self.world)

    def on_first(self, work: Callable[[], T]) -> T:
        name = self._name("first")
        if not self.first:
            return self._answer(self._wait(name, 0))
        try:
            value = work()
        except ProcessGone:
            raise
        except LdmError as error:
            self.store.set(name, _told(error))
            raise self.of_all(error) from None
        self.store.set(name, json.dumps({"value": value}))
        return value

    def together(self, work: Callable[[], T]) -> T:
        name, value, own = self._name("together"), None, None
        try:
            value = work()
        except ProcessGone:
            raise
        except LdmError as error:
            own = error
        self.store.set(f"{name}/{self.rank}", _told(own) if own else json.dumps({"value": None}))
        answers = [self._wait(f"{name}/{rank}", rank) for rank in range(self.world)]
        if own is not None:
            raise self.of_all(own) from None
        for answer in answers:
            self._answer(answer)
        return value

    def agreed(self, work: Callable[[], T]) -> T:
        value, own, name = None, None, self._name("agreed")
        try:
            value = work()
        except ProcessGone:
            raise
        except LdmError as error:
            own = error
            self.store.set(f"{name}/{self.rank}", _told(error))
        worst = self._reduce([self.world - self.rank if own else 0], "MAX")[0]
        if own is not None:
            raise self.of_all(own) from None
        if worst:
            rank = self.world - int(worst)
            self._answer(self._wait(f"{name}/{rank}", rank))
        return value

    def as_first(self, value: bool) -> bool:
        return bool(self._reduce([float(value and self.first)], "MAX")[0])

    def total(self, loss: Tensor) -> Tensor:
        found = self._reduce([float(loss) / self.world, *self._heard()], "SUM")
        self._hear(found[1:])
        return self._torch.tensor(found[0], dtype=loss.dtype, device=loss.device)

    def any_of(self, flags: list[bool]) -> list[bool]:
        return [bool(value) for value in self._reduce(list(map(float, flags)), "MAX")]

    def gathered(self, texts: list[str]) -> list[str]:
        name = self._name("gathered")
        self.store.set(f"{name}/{self.rank}", json.dumps(texts))
        return [text for rank in range(self.world) for text in json.loads(self._wait(f"{name}/{rank}", rank))]

    def listen(self, stop: StopRequest) -> None:
        self._stop, self._signal = stop, None

    def hear(self) -> None:
        self._hear(self._reduce(self._heard(), "SUM"))

    def signal(self, stop: StopRequest) -> int | None:
        return self._signal

    def at_once(self, stop: StopRequest) -> AbstractContextManager[None]:
        return nullcontext()

    def of_all(self, error: LdmError) -> LdmError:
        error.shared = True
        return error

    def failed(self, error: BaseException) -> BaseException:
        """A broken connection as the process that is missing, said by one of those that are left."""
        if getattr(error, "shared", False):
            return error
        if why := _lost(error):
            self._name("failed")  # whoever is stuck does not come to this
            if gone := self._gone(PATIENCE if "Timed out" in why else BROKEN, hung=True):
                return gone
        if not isinstance(error, ProcessGone):
            self.hearts.tell_fault(str(error) or type(error).__name__)
            console.level = self.level
        return error

    def leave(self) -> None:
        self.hearts.leave()
        self._dist.destroy_process_group()

    def _name(self, kind: str) -> str:
        """All processes do the same things in the same order, so a count names each."""
        self._count += 1
        self.hearts.entered = self._count
        return f"ldm/{kind}/{self._count}"

    def _reduce(self, values: list[float], how: str) -> list[float]:
        """Each number's maximum or sum over the processes, on the CPU whatever the network is on."""
        tensor = self._torch.tensor(values, dtype=self._torch.float64)
        self._name("reduce")
        self._dist.all_reduce(tensor, getattr(self._dist.ReduceOp, how))
        return tensor.tolist()

    def _heard(self) -> list[float]:
        """Whether there was SIGINT, SIGTERM."""
        own = self._stop.signal if self._stop else None
        return [float(own == number) for number in console.STOPPING]

    def _hear(self, counts: list[float]) -> None:
        found = [number for number, count in zip(console.STOPPING, counts) if count]
        self._signal = found[-1] if found else self._signal

    def _wait(self, name: str, rank: int) -> str:
        """What `rank` sets under a name, however long that takes. Raises ProcessGone where one shows no life."""
        pause, look = 0.01, time.monotonic() + LOOK
        while not self._there(name):
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
            if time.monotonic() > look:
                self._look()
                look = time.monotonic() + LOOK
        return self.store.get(name).decode()

    def _there(self, name: str) -> bool:
        try:
            return self.store.check([name])
        except RuntimeError:  # the store is gone
            self._look()
            return False

    def _look(self) -> None:
        """Raise ProcessGone where one shows no life."""
        if gone := self._gone(PATIENCE):
            raise gone from None

    def _gone(self, patience: float, hung: bool = False) -> ProcessGone | None:
        """Who is missing, None where nobody is. The one with the lowest number of those that are left says it."""
        missing, told = self.hearts.missing(patience, hung)
        if not missing:
            return None
        left = [rank for rank in range(self.world) if rank not in missing]
        console.level = self.level if self.rank == left[0] else SILENT
        return ProcessGone(told, todo="go on with --resume latest")

    def _answer(self, told: str) -> Any:
        """The value that was told; raises the error that was."""
        found = json.loads(told)
        if "error" not in found:
            return found["value"]
        error = LdmError.__new__(getattr(errors, found["kind"]))
        LdmError.__init__(error, found["error"])
        error.exit_code = found["code"]
        raise self.of_all(error)


def _told(error: LdmError) -> str:
    kind = next(kind.__name__ for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
    return json.dumps({"error": str(error), "code": error.exit_code, "kind": kind})


def _lost(error: BaseException | None) -> str:
    """What PyTorch says of the broken connection that this came of, if so: it may be a signal on top of that."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            return str(error)
        error = error.__context__
    return ""


@contextmanager
def _deaf() -> Iterator[None]:
    """A block that no signal ends: torchrun sends one to all that are left as soon as one is gone."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in console.STOPPING if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_met: list[Any] = []  # the store that this process found, its rank, their number, and the runs so far


def _meet() -> tuple[Any, int, int]:
    """A part of the store of all processes for the run that begins, this one's rank, their number."""
    import torch.distributed as dist

    if not _met:
        _met[:] = [*next(dist.rendezvous("env://", timeout=TIMEOUT)), 0]
    store, rank, world, _ = _met
    _met[3] += 1
    return dist.PrefixStore(f"run {_met[3]}", store), rank, world


ALONE = Alone()
_current: Alone = ALONE


def current() -> Alone:
    """The processes of the run that goes on here."""
    return _current


@contextmanager
def processes() -> Iterator[Alone]:
    """All processes that were started for this run, for a `with` block that each of them enters."""
    global _current
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or _current is not ALONE:
        yield _current
        return
    _current = group = Many()
    try:
        yield group
        group.together(lambda: None)  # what was started together ends together
    except BaseException as error:
        with _deaf():
            said = group.failed(error)
            group.leave()
        if said is error:
            raise
        raise said from None
    else:
        group.leave()
    finally:
        _current = ALONE
