"""The thread that turns drawn images into files and lines, while the next batch is drawn.

Decoding is not done here. On a CPU it needs the cores that the next batch needs: of an image's time (the default
model, 25 steps, fp32) it is 6 %, the PNG 0.5 %, and in a thread beside the U-Net it took 1.02 of the CPU time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.errors import Interrupted, LdmError
from ldm.images import Metadata
from ldm.images import encode as encode_image
from ldm.pipeline.metadata import parameters
from ldm.render.jobs.jobs import Job
from ldm.render.output.manifest import Manifest, Report

REMARKS = ("truncated", "unknown_words", "remarks", "allow_unapplied")
WAITING = 16  # images at most between the networks and the disk


@dataclass(frozen=True)
class Drawn:
    """What became of a job: an image with its metadata, or the reason why there is none."""

    job: Job
    image: Image.Image | bytes | None  # bytes: those of its file
    metadata: dict[str, Any]
    error: LdmError | None = None
    seconds: float = 0.0  # of its batch, divided by the images in it

    @property
    def remarks(self) -> dict[str, Any]:
        """The metadata that the manifest's line has too."""
        return {name: self.metadata[name] for name in REMARKS if self.metadata.get(name)}


@dataclass(frozen=True)
class Encode:
    """How an image becomes the bytes of a file: `encode(drawn)`."""

    format: str
    metadata: bool  # whether its metadata goes inside

    def __call__(self, drawn: Drawn) -> bytes:
        if isinstance(drawn.image, bytes):
            return drawn.image
        inside = Metadata(parameters(drawn.metadata), drawn.metadata) if self.metadata else None
        return encode_image(drawn.image, self.format, inside)


class WriterStopped(Exception):
    """Nothing more is written, because of `error`."""

    def __init__(self, error: BaseException):
        self.error = error
        super().__init__(str(error))


class Writer:
    """Encodes and saves images, one after the other: `with Writer(…) as writer: writer.put(drawn)`.

    encode     a Drawn's image as the bytes of a file
    advance    called with 1 after each job that is written

    All that touches manifest and report while images are drawn happens in this one thread. The first error in it
    (disk full) ends the writing: what waits is dropped, and `put`, `check` and leaving the block raise WriterStopped.
    Leaving the block writes what waits, unless KeyboardInterrupt is what leaves it.
    """

    def __init__(
        self, manifest: Manifest, report: Report, encode: Callable[[Drawn], bytes], advance: Callable[[int], object]
    ):
        self._manifest, self._report, self._encode, self._advance = manifest, report, encode, advance
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
        """Hand an image over; waits while too many are waiting. Raises WriterStopped."""
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
            self._manifest.save(drawn.job, self._encode(drawn), seconds=round(drawn.seconds, 4), **drawn.remarks)
            self._report.rendered += 1
        else:
            self._manifest.fail(drawn.job, drawn.error)
            self._report.failed(drawn.job, drawn.error)
        self._advance(1)
