"""Heartbeats between the processes of a run, so that a failure can name the missing process."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from ldm.errors import ProcessGone

BEAT = 1.0  # seconds
LOOK = 5  # beats between two looks at the others
HUNG = 60.0  # seconds without another's heartbeat after which a process that waits for it by other means ends itself


class Heartbeat:
    """A thread that writes this process's heartbeat to the store, with the number of its last exchange."""

    def __init__(self, store: Any, rank: int, world: int):
        self.rank, self.world, self.entered = rank, world, 0
        self._store, self._own = store.clone(), store.clone()  # a connection serves one caller at a time
        self._end = threading.Event()
        self._seen: dict[int, tuple[str, float]] = {}  # the others' last heartbeats, and when each was new
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self._store.set(f"ldm/beat/{rank}", "0 0")
        self._thread.start()

    def _beat(self) -> None:
        count = 0
        while not self._end.wait(BEAT):
            count += 1
            try:
                self._own.set(f"ldm/beat/{self.rank}", f"{count} {self.entered}")
                gone = self._silent() if count % LOOK == 0 else []
            except RuntimeError:  # the store went with its process
                gone = [0] if not self._end.wait(HUNG) else []
                if not gone:
                    return
            if gone:
                self._abandon(gone)

    def _silent(self) -> list[int]:
        """The others that have had no heartbeat for HUNG seconds, and have not left."""
        now, gone = time.monotonic(), []
        for rank in range(self.world):
            name = f"ldm/beat/{rank}"
            if rank == self.rank or not self._own.check([name]) or self._own.check([f"ldm/bye/{rank}"]):
                continue
            text = self._own.get(name).decode()
            before, since = self._seen.get(rank, ("", now))
            if text != before:
                self._seen[rank] = text, now
            elif now - since > HUNG:
                gone.append(rank)
        return gone

    def _abandon(self, gone: list[int]) -> None:
        """End this process, whose main thread may wait for ever: NCCL does not tell it that the others are gone."""
        if self.rank == min(rank for rank in range(self.world) if rank not in gone):
            told = f"error: {_named(gone, self.world)} gone; go on with --resume latest"
            print(told, file=sys.stderr, flush=True)
        os._exit(ProcessGone.exit_code)

    def missing(self, patience: float, hung: bool = False) -> tuple[list[int], str]:
        """(ranks, text) of the processes without a heartbeat for `patience` seconds, or that told a fault.

        With `hung`, if all are alive, of those that do not reach the exchange where this process is.
        """
        try:
            return self._look(patience, hung)
        except RuntimeError:
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                return [self.world], "the launcher (torchrun) of the first machine is gone"
            return [0], f"process 0 of {self.world} is gone"

    def _look(self, patience: float, hung: bool) -> tuple[list[int], str]:
        names = {rank: f"ldm/beat/{rank}" for rank in range(self.world) if rank != self.rank}
        self._store.wait(list(names.values()))
        before, end = self._beats(names), time.monotonic() + patience
        still = behind = list(names)
        while (still or behind) and time.monotonic() < end:
            time.sleep(BEAT / 4)
            faults = {rank: f"ldm/fault/{rank}" for rank in names if self._store.check([f"ldm/fault/{rank}"])}
            if faults:
                told = (f"process {rank} of {self.world}: {self._store.get(n).decode()}" for rank, n in faults.items())
                return list(faults), "; ".join(told)
            now = self._beats(names)
            still = [rank for rank in still if now[rank] == before[rank]]
            behind = [rank for rank, text in now.items() if hung and int(text.split()[1]) < self.entered]
        what = "gone" if still else "stuck"
        return still or behind, f"{_named(still or behind, self.world)} {what}" if still or behind else ""

    def _beats(self, names: dict[int, str]) -> dict[int, str]:
        return {rank: self._store.get(name).decode() for rank, name in names.items()}

    def tell_fault(self, text: str) -> None:
        """Tell the others why this process ends."""
        with suppress(RuntimeError):
            self._store.set(f"ldm/fault/{self.rank}", text)

    def leave(self) -> None:
        """Stop. The first process may hold the store, so it waits up to 5 s until the others have read it."""
        self._end.set()
        self._thread.join(2 * BEAT)
        with suppress(RuntimeError):
            self._store.set(f"ldm/bye/{self.rank}", "")
            end = time.monotonic() + 5
            names = [f"ldm/bye/{rank}" for rank in range(self.world)]
            while self.rank == 0 and time.monotonic() < end and not self._store.check(names):
                time.sleep(0.05)


def _named(ranks: list[int], world: int) -> str:
    """`process 1 of 2 is`, `processes 1, 3 of 4 are`."""
    if len(ranks) == 1:
        return f"process {ranks[0]} of {world} is"
    return f"processes {', '.join(map(str, ranks))} of {world} are"
