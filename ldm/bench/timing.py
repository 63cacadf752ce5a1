"""Sides of a comparison: each in a process of its own, compared first and then timed in alternation."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm import console
from ldm.device import free_memory, is_out_of_memory
from ldm.errors import first_line
from ldm.files import format_bytes

OURS, PEER, COMPILED = "ldm", "diffusers", "diffusers compiled"
PEER_FP32 = "diffusers fp32"  # what diffusers computes in where nothing is asked for
KILLED = "out of memory"
PROCESS = 0.7e9  # bytes of a process with torch, transformers and diffusers, and room for the system
SHARED = ("torch", "diffusers.models.autoencoders.autoencoder_kl", "transformers.models.clip.modeling_clip")


class Work(NamedTuple):
    """What a side does, in its process."""

    call: Callable[[], object]  # is timed
    answer: Callable[[], Tensor | None]  # called once before, in any case: what is compared; None: nothing
    in_child: bool = False  # `call` runs a process of its own, whose memory counts


class Side(NamedTuple):
    build: Callable[..., Work]  # called with `arguments` in the side's process
    arguments: tuple = ()
    needs: float = 0.0  # bytes, about, beside those of any process


@dataclass(frozen=True)
class Row:
    """What is to be measured: the first side is ours, the one to compare with is `PEER` or else the last."""

    name: str
    title: str
    sides: dict[str, Side]
    settings: dict[str, Any]
    limit: float  # the largest difference of answers at which a side is timed
    relative: bool = False  # differences are RMS over RMS; else the largest one, in levels of 255
    warmup: int = 0  # rounds that do not count, after the first
    device: str = "cpu"
    left_out: dict[str, str] = field(default_factory=dict)  # side -> why it is not there
    once: bool = False  # what is compared is timed, and done once: of sides that gain nothing by doing it again


@dataclass(frozen=True)
class Timing:
    """Seconds of every repetition of every side; the first side is ours. Without any the row was skipped."""

    name: str
    seconds: dict[str, list[float]]
    settings: dict[str, Any] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)  # differences between the results of the sides
    title: str = ""
    memory: dict[str, int] = field(
        default_factory=dict
    )  # side -> bytes at its peak: of its process, on a GPU of tensors
    left_out: dict[str, str] = field(default_factory=dict)  # side -> why it was not measured
    differs: bool = False  # a side was left out because its result is another one

    @property
    def medians(self) -> dict[str, float]:
        """Seconds of each side."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    @property
    def ratio(self) -> float | None:
        """Our median divided by diffusers' (without one, by the last side's): below 1 we are faster."""
        return self.ratio_to(PEER if PEER in self.seconds else next(reversed(self.seconds), ""))

    def ratio_to(self, side: str) -> float | None:
        """Our median divided by that of a side; None for our own and for one that was not measured."""
        medians = self.medians
        ours = next(iter(medians), side)
        return None if side == ours or side not in medians else medians[ours] / medians[side]

    def as_json(self) -> dict[str, Any]:
        """The timing as JSON values."""
        ratio = self.ratio
        found = {"bench": self.name, "title": self.title, "ratio": ratio and round(ratio, 4), "medians": self.medians}
        found |= {"seconds": self.seconds, "memory": self.memory, "left_out": self.left_out}
        return {**found, "agreement": self.agreement, "settings": self.settings}

    def text(self) -> str:
        """The timing as text: the settings, a line for each side with median, range, memory and our ratio to it."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [": ".join(filter(None, (self.name, self.title, settings)))]
        width = max(map(len, (*self.seconds, *self.left_out, "")))
        for name, values in self.seconds.items():
            line = f"  {name:{width}}  {self.medians[name]:8.3f} s  ({min(values):.3f} to {max(values):.3f}, "
            line += f"{len(values)} times)"
            line += f"  {format_bytes(self.memory[name])}" if name in self.memory else ""
            ratio = self.ratio_to(name)
            lines.append(line if ratio is None else f"{line}  ratio {ratio:.2f}")
        lines += [f"  {name:{width}}  left out: {why}" for name, why in self.left_out.items()]
        return "\n".join([*lines, *(f"  {name}: {value:.4g}" for name, value in self.agreement.items())])


def alternate(sides: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each side, in alternation, after `warmup` untimed rounds.

    Other load on the machine slows all sides equally then. Each side has to wait for its own device.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in console.progress(range(warmup + repeats), desc="measuring", unit="round"):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(row: Row, repeats: int, profile: bool = False) -> Timing:
    """Build every side in a process of its own, compare the answers, and time the sides that agree in alternation.

    Sides that memory has no room for, fail, or give another answer are left out, and `left_out` says why. Raises what
    our own side raises.
    """
    room = free_memory(torch.device(row.device))
    built = _fitting(row, room)
    too_large = {name: f"too large: {format_bytes(room)} are free" for name in row.sides if name not in built}
    left_out = {**too_large, **row.left_out}
    memory: dict[str, int] = {}
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="ldm-bench-"))
        ask = {name: stack.enter_context(own_process(scratch)) for name in built}
        answers, first = _answers(row, ask, left_out)
        agreement, differing = _compared(row, answers)
        left_out |= differing
        sides = {name: functools.partial(_wait, ask[name], _again) for name in answers if name not in left_out}
        if OURS not in sides:
            sides = {}
        try:
            once = {name: [first[name]] for name in sides if row.once}
            seconds = once or (alternate(sides, repeats, row.warmup) if sides else {})
            memory = {name: _wait(ask[name], _peak, row.device) for name in sides}
        except (BrokenExecutor, MemoryError, RuntimeError) as error:
            if not _lacked_memory(error):
                raise
            seconds, left_out[OURS] = {}, KILLED
        for name in sides if profile else ():
            print(f"{name}\n{_wait(ask[name], _profiled, row.device)}")
    return Timing(row.name, seconds, row.settings, agreement, row.title, memory, left_out, differs=bool(differing))


def _answers(
    row: Row, ask: Mapping[str, Callable[..., Any]], left_out: dict[str, str]
) -> tuple[dict[str, Tensor | None], dict[str, float]]:
    """What each side answers, all at a time, or by turns where that is timed (`once`), with the seconds; those that
    fail come into `left_out`."""
    answers: dict[str, Tensor | None] = {}
    seconds: dict[str, float] = {}
    for name in ask if row.once else ():
        _wait(ask[name], os.getpid)  # its process has started
    futures = {} if row.once else {name: ask[name](_build, row.sides[name]) for name in ask}
    for name in ask:
        start = time.perf_counter()
        try:
            answers[name] = (futures.get(name) or ask[name](_build, row.sides[name])).result()
            seconds[name] = time.perf_counter() - start
        except Exception as error:
            if name == OURS and not _lacked_memory(error):
                raise
            left_out[name] = KILLED if isinstance(error, BrokenExecutor) else first_line(error)
    return answers, seconds


def _lacked_memory(error: BaseException) -> bool:
    return isinstance(error, BrokenExecutor) or is_out_of_memory(error)


def _fitting(row: Row, room: float) -> list[str]:
    """The sides that fit into so many bytes together, ours first; none where ours does not."""
    fitting = []
    for name, side in row.sides.items():
        room -= side.needs + (PROCESS if row.device == "cpu" else 0)
        if room < 0:
            break
        fitting.append(name)
    return fitting


def _compared(row: Row, answers: Mapping[str, Tensor | None]) -> tuple[dict[str, float], dict[str, str]]:
    """({what differs from ours: by how much}, {side that differs by more than the limit: so})."""
    agreement, differing, ours = {}, {}, answers.get(OURS)
    unit = "of the RMS" if row.relative else "of 255"
    for name, answer in answers.items():
        if name == OURS or ours is None or answer is None:
            continue
        if row.relative:
            found = float((answer - ours).square().mean().sqrt() / ours.square().mean().sqrt())
        else:
            found = float((answer - ours).abs().max())
        agreement[f"{name}: difference {unit}"] = found
        if not found <= row.limit:
            differing[name] = f"its result differs by {found:.2g} {unit}"
    return agreement, differing


@contextmanager
def own_process(scratch: str) -> Iterator[Callable[..., Any]]:
    """A function that calls others in one process, and returns futures; the process has as many threads as this one.

    `new_folder` makes folders in `scratch` there. The process is forked from one that has imported what all sides need
    and computed nothing, where that is safe.
    """
    kind = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if kind.get_start_method() == "forkserver":
        kind.set_forkserver_preload(["ldm.bench.timing", *SHARED])
    with ProcessPoolExecutor(1, kind, _begin, (torch.get_num_threads(), scratch)) as pool:
        yield pool.submit


def _wait(ask: Callable[..., Any], function: Callable, *arguments: Any) -> Any:
    return ask(function, *arguments).result()


_WORK: list[Work] = []  # of this process
_SCRATCH: list[str] = []  # a folder that is removed by the process that started this one


def _begin(threads: int, scratch: str) -> None:
    warnings.simplefilter("ignore")  # of other libraries, between the results
    torch.set_num_threads(threads)
    _SCRATCH[:] = [scratch]


def new_folder() -> Path:
    """An empty folder, for a side; it is removed when all sides have been timed."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH[0] if _SCRATCH else None))


def _build(side: Side) -> Tensor | None:
    with console.hushed():
        _WORK[:] = [side.build(*side.arguments)]
        return _WORK[0].answer()


def _again() -> None:
    with console.hushed():
        _WORK[0].call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _peak(device: str) -> int:
    """Bytes: of the tensors on a GPU, else of the process."""
    if torch.device(device).type == "cuda" and not _WORK[0].in_child:
        return torch.cuda.max_memory_allocated()
    who = resource.RUSAGE_CHILDREN if _WORK[0].in_child else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _profiled(device: str) -> str:
    """The operators that take longest, as a table of torch's profiler."""
    with torch.profiler.profile() as profile:
        _again()
    by = "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40)
