"""The thread that turns drawn pictures into files and lines, while the next batch is drawn.

Decoding is not done here. On a CPU it needs the cores that the next batch needs: of a picture's time (the default
model, 25 steps, fp32) it is 6 %, the PNG 0.5 %, and in a thread beside the U-Net it took 1.02 of the CPU time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ldm import images
from ldm.errors import Interrupted, LdmError
from ldm.pipeline.metadata import parameters
from ldm.render.jobs.jobs import Job
from ldm.render.output.manifest import Manifest, Report

if TYPE_CHECKING:
    from PIL import Image

REMARKS = ("truncated", "unknown_words", "remarks")
WAITING = 16  # pictures at most between the networks and the disk


@dataclass(frozen=True)
class Drawn:
    """What became of a job: a picture with its record, or the reason why there is none."""

    job: Job
    image: Image.Image | bytes | None  # bytes: those of its file
    record: dict[str, Any]
    error: LdmError | None = None
    seconds: float = 0.0  # of its batch, divided by the pictures in it

    @property
    def remarks(self) -> dict[str, Any]:
        """What of the record the manifest's line tells too."""
        return {name: self.record[name] for name in REMARKS if self.record.get(name)}


@dataclass(frozen=True)
class Encode:
    """How a picture becomes the bytes of a file: `encode(drawn)`."""

    format: str
    metadata: bool  # whether its record goes inside

    def __call__(self, drawn: Drawn) -> bytes:
        if isinstance(drawn.image, bytes):
            return drawn.image
        inside = images.Metadata(parameters(drawn.record), drawn.record) if self.metadata else None
        return images.encode(drawn.image, self.format, inside)


class WriterStopped(Exception):
    """Nothing more is written, because of `error`."""

    def __init__(self, error: BaseException):
        self.error = error
        super().__init__(str(error))


class Writer:
    """Encodes and saves what it is given, one after the other: `with Writer(…) as writer: writer.put(drawn)`.

    encode     a Drawn's picture as the bytes of a file
    advance    called with 1 after each job that is written

    All that touches manifest and report while pictures are drawn happens in this one thread. The first error in it
    (disk full) ends the writing: what waits is dropped, and `put`, `check` and leaving the block raise WriterStopped.
    Leaving the block writes what waits, unless KeyboardInterrupt is what leaves it.
    """

    def __init__(
        self,
        ledger: Manifest,
        report: Report,
        encode: Callable[[Drawn], bytes],
        advance: Callable[[int], object],
    ):
        self._ledger, self._report, self._encode, self._advance = ledger, report, encode, advance
        self._queue: queue.Queue[Drawn | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exc) -> None:
        self._dropping = self._dropping or (kind is not None and issubclass(kind, KeyboardInterrupt))
        self._queue.put(None)
        self._thread.join()
        if kind is None or issubclass(kind, Interrupted):
            self.check()

    def put(self, drawn: Drawn) -> None:
        """Hand a picture over; waits while too many are waiting. Raises WriterStopped."""
        self.check()
        self._queue.put(drawn)

    def check(self) -> None:
        """Raise WriterStopped where an error stopped the writing."""
        if self._error is not None:
            raise WriterStopped(self._error)

    def _run(self) -> None:
        while (drawn := self._queue.get()) is not None:
            if self._dropping:
                continue
            try:
                self._write(drawn)
            except BaseException as error:
                self._error, self._dropping = error, True

    def _write(self, drawn: Drawn) -> None:
        if drawn.error is None:
            self._ledger.save(drawn.job, self._encode(drawn), seconds=round(drawn.seconds, 4), **drawn.remarks)
            self._report.count("rendered")
        else:
            self._ledger.fail(drawn.job, drawn.error)
            self._report.failed(drawn.job, drawn.error)
        self._advance(1)
