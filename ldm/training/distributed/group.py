"""The processes that share a run: process 0 writes and prints, all agree on settings and errors, a dead one is named.

`torchrun` or `accelerate launch` starts them and sets RANK, WORLD_SIZE and LOCAL_RANK.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ldm import console, errors
from ldm.console import SILENT, StopRequest
from ldm.errors import ConfigError, LdmError, ProcessGone, first_line
from ldm.training.distributed.alone import ALONE, Alone, RowShard, T, set_current
from ldm.training.distributed.heartbeat import Heartbeat

if TYPE_CHECKING:
    from torch import Tensor

TIMEOUT = timedelta(minutes=10)  # for a collective operation: all processes reach it within this time
PATIENCE = 15.0  # seconds without a heartbeat after which a process counts as gone
LOOK = 5.0  # seconds between two such checks
BROKEN = 5.0  # seconds without a heartbeat after a connection broke, when some process is certainly gone

LOST = ("gloo", "NCCL", "Timed out", "Broken pipe", "Connection")  # in what PyTorch says of a broken connection


class Many(Alone):
    """One of several processes. Raises ConfigError if the environment does not say how they find each other."""

    def __init__(self) -> None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else each broken connection is a page of its stack
        import torch
        import torch.distributed as dist

        self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
        if gpus:  # where each process sees one alone (SLURM binds them so) that is number 0
            torch.cuda.set_device(local if local < gpus else 0)
        try:
            self.store, self.rank, self.world = _meet()
            backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
            dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as error:
            what = f"is {os.environ['WORLD_SIZE']}, but the processes do not find each other ({first_line(error)})"
            raise ConfigError(what, where="WORLD_SIZE", hint="start them by torchrun, or unset it") from None
        self.first, self.level = self.rank == 0, max(console.level, SILENT + 1)
        self._dist, self._torch = dist, torch
        self._count, self._stop, self._signal = 0, None, None
        self.heartbeat = Heartbeat(self.store, self.rank, self.world)
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

    def on_all(self, work: Callable[[], T]) -> T:
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

    def from_first(self, value: bool) -> bool:
        return bool(self._reduce([float(value and self.first)], "MAX")[0])

    def total(self, loss: Tensor) -> Tensor:
        found = self._reduce([float(loss) / self.world, *self._heard()], "SUM")
        self._hear(found[1:])
        return self._torch.tensor(found[0], dtype=loss.dtype, device=loss.device)

    def whole(self, values: Tensor, part: RowShard) -> Tensor:
        found = self._torch.zeros((part.size, *values.shape[1:]), dtype=values.dtype)
        if part.own:
            found[list(part.own)] = values.detach().cpu()
        self._name("whole")
        self._dist.all_reduce(found)  # every row is zero on all processes except its own
        return found.to(values.device)

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
        """Turn a broken connection into ProcessGone that names the missing process; one of the others prints it."""
        if getattr(error, "shared", False):
            return error
        if why := _lost(error):
            self._name("failed")  # whoever is stuck does not come to this
            if gone := self._gone(PATIENCE if "Timed out" in why else BROKEN, hung=True):
                return gone
        if not isinstance(error, ProcessGone):
            self.heartbeat.tell_fault(str(error) or type(error).__name__)
            console.level = self.level
        return error

    def leave(self) -> None:
        self.heartbeat.leave()
        self._dist.destroy_process_group()

    def _name(self, kind: str) -> str:
        """A name for the next exchange. All processes make the same exchanges in the same order, so a count will do."""
        self._count += 1
        self.heartbeat.entered = self._count
        return f"ldm/{kind}/{self._count}"

    def _reduce(self, values: list[float], how: str) -> list[float]:
        """The maximum or sum of each number over the processes, computed on the CPU."""
        tensor = self._torch.tensor(values, dtype=self._torch.float64)
        self._name("reduce")
        self._dist.all_reduce(tensor, getattr(self._dist.ReduceOp, how))
        return tensor.tolist()

    def _heard(self) -> list[float]:
        """1.0 for each of SIGINT, SIGTERM that this process has received."""
        own = self._stop.signal if self._stop else None
        return [float(own == number) for number in console.STOPPING]

    def _hear(self, counts: list[float]) -> None:
        found = [number for number, count in zip(console.STOPPING, counts) if count]
        self._signal = found[-1] if found else self._signal

    def _wait(self, name: str, rank: int) -> str:
        """Wait for the value that `rank` sets under a name. Raises ProcessGone if a process has no heartbeat."""
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
        """Raise ProcessGone if a process has no heartbeat."""
        if gone := self._gone(PATIENCE):
            raise gone from None

    def _gone(self, patience: float, hung: bool = False) -> ProcessGone | None:
        """An error that names the missing processes, or None. The lowest of the remaining ranks prints it."""
        missing, told = self.heartbeat.missing(patience, hung)
        if not missing:
            return None
        left = [rank for rank in range(self.world) if rank not in missing]
        console.level = self.level if self.rank == left[0] else SILENT
        return ProcessGone(told, hint="go on with --resume latest")

    def _answer(self, told: str) -> Any:
        """The value in an answer; raises the error in it."""
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
    """PyTorch's text of the broken connection that caused this error, or ""."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
            return str(error)
        error = error.__context__
    return ""


@contextmanager
def _deaf() -> Iterator[None]:
    """A block that ignores signals: torchrun signals the remaining processes as soon as one is gone."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in console.STOPPING if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_met: list[Any] = []  # the store, this process's rank, the number of processes, the runs so far


def _meet() -> tuple[Any, int, int]:
    """(a part of the shared store for the next run, this process's rank, the number of processes)."""
    import torch.distributed as dist

    if not _met:
        _met[:] = [*next(dist.rendezvous("env://", timeout=TIMEOUT)), 0]
    store, rank, world, _ = _met
    _met[3] += 1
    return dist.PrefixStore(f"run {_met[3]}", store), rank, world


@contextmanager
def joined() -> Iterator[Many]:
    """The processes that torchrun started, from their meeting to the end of the block, which each of them enters."""
    group = Many()
    set_current(group)
    try:
        yield group
        group.on_all(lambda: None)  # what was started together ends together
    except BaseException as error:
        with _deaf():
            raised = group.failed(error)
            group.leave()
        if raised is error:
            raise
        raise raised from None
    else:
        group.leave()
    finally:
        set_current(ALONE)


def rows_of(size: int, rows: Iterable[int], world: int) -> RowShard:
    """The shard of these rows of a batch of `size`; the other rows go to the other `world` - 1 processes."""
    rows = tuple(rows)
    if world == 1:
        return RowShard(size)
    return RowShard(size, rows, world * len(rows) / size) if rows else RowShard(size, (0,), 0.0)
