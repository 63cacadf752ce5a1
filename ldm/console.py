"""Progress bars, one-line messages, and signals that end the work after the current step."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

SILENT = -2  # not even warnings: in all processes of a run except one
STOPPING = (signal.SIGINT, signal.SIGTERM)
level = 0  # -1 quiet, 0 normal, 1 verbose; set by the command line
_warned: set[str] | None = None  # the warnings that were shown inside `hushed`


def progress(
    iterable=None, total: int | None = None, desc: str = "", unit: str = "it", disable: bool = False, initial: int = 0
):
    """A tqdm bar on stderr; silent when quiet, and when stderr is no terminal unless LDM_PROGRESS=1."""
    hidden = disable or level < 0 or not (sys.stderr.isatty() or os.environ.get("LDM_PROGRESS") == "1")
    options = {"desc": desc, "unit": unit, "unit_scale": unit == "B", "disable": hidden, "initial": initial}
    return _bar()(iterable, total=total, dynamic_ncols=True, **options)


@functools.cache
def _bar() -> type:
    """tqdm with a lock for this process alone: a forked child that is killed with the shared one would block all."""
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
    return tqdm


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """No bars inside the block, and each warning only once: for work that another bar already shows."""
    global level, _warned
    before, level, _warned = (level, _warned), min(level, -1), set()
    try:
        yield
    finally:
        level, _warned = before


def say(text: str, verbosity: int = 0) -> None:
    """One line on stderr, shown from `verbosity` up (0 normal, 1 only with -v)."""
    if level >= verbosity:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One `warning: …` line on stderr; -q does not silence it."""
    if level == SILENT:
        return
    if _warned is not None:
        if text in _warned:
            return
        _warned.add(text)
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM, unwinding like Ctrl-C."""


class StopRequest:
    """While active, SIGINT and SIGTERM set `.signal` instead of raising; a second one raises KeyboardInterrupt, or
    Terminated for SIGTERM.

    Long loops check `if stop.signal:` after each unit of work, save, and exit with the code 128 + signal.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waits = True

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that the first signal ends at once: for work without results to save."""
        try:
            self._waits = False
            yield
        except KeyboardInterrupt:
            if self.signal is None:
                raise
        finally:
            self._waits = True

    def __enter__(self) -> StopRequest:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._handle) for s in STOPPING}
        return self

    def __exit__(self, *_exc) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
        with contextlib.suppress(RuntimeError, OSError):  # inside another write; without a terminal
            when = "after this step" if self._waits else "here"
            say(f"stopping {when} ({signal.Signals(number).name}); again to stop at once")
        if not self._waits:
            raise KeyboardInterrupt
