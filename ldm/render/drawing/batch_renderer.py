"""Drawing a run's jobs: window by window, group by group, batch by batch; what fails is named and the rest goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from ldm import console
from ldm.console import StopRequest
from ldm.device import keep_memory
from ldm.errors import Interrupted, LdmError, NumericsError, ResourceError
from ldm.pipeline.adapters import with_few_steps
from ldm.pipeline.engine import Engine
from ldm.pipeline.metadata import make_metadata, warnings_of
from ldm.pipeline.request import Settings
from ldm.render.drawing.writer import Drawn, Writer
from ldm.render.jobs.batches import Group, batch_size, groups, windows
from ldm.render.jobs.jobs import Job
from ldm.render.jobs.resolve import Resolver, adapters_of, image_request
from ldm.render.replay.replay import differences

IN_MEMORY = 32  # images that others are drawn from
WARNINGS = 5  # remarks on prompts that are shown; all are in the manifest


class BatchRenderer:
    """Draws jobs and hands them to a writer.

    stop        looked at after each batch
    batch_size  None: by the memory that is free
    """

    def __init__(self, resolver: Resolver, writer: Writer, stop: StopRequest, batch_size: int | None = None):
        self._resolver, self._writer, self._stop, self._batch_size = resolver, writer, stop, batch_size
        self._broken: dict[tuple[str, ...], LdmError] = {}  # weights of groups that could not be loaded
        self._last: Group | None = None
        self._engine: Engine | None = None  # the one used last
        self._warned: set[str] = set()
        keep_memory()

    def draw(self, jobs: Iterable[Job]) -> None:
        """All of them, ordered window by window so that models change seldom.

        Raises Interrupted after the batch in which a signal came, and WriterStopped.
        """
        for window in windows(jobs):
            for group, members in groups(window, self._last):
                self._last = group
                held = {"image", "control_image", "ip_adapter_image"} & members[0].settings.keys()
                size = IN_MEMORY if held else len(members)
                for start in range(0, len(members), size):
                    self._draw_group(group, members[start : start + size])

    def _draw_group(self, group: Group, jobs: Sequence[Job]) -> None:
        """Jobs that share model, LoRAs and settings; a model that cannot be loaded fails all of them."""
        left = dict(enumerate(jobs))
        try:
            engine, settings = self._loaded(group, jobs[0])
            metadata = self._metadata(engine, settings, jobs)
            while left:
                self._draw_left(engine, settings, left, metadata)
        except Interrupted:
            raise
        except LdmError as error:
            alone = len(left) == 1 or group.weights in self._broken
            for job in left.values():
                if alone:
                    self._writer.put(Drawn(job, None, {}, error))
                else:  # it may be the fault of one text
                    self._draw_group(group, [job])

    def _loaded(self, group: Group, job: Job) -> tuple[Engine, Settings]:
        """The engine of a group with its weights loaded, and its settings. Raises what loading raised before."""
        if group.weights in self._broken:
            raise self._broken[group.weights]
        engine, settings = self._resolver.drawable(job.settings)
        if self._engine is not None and self._engine is not engine:
            self._engine.unload_beside()
        self._engine = engine
        try:
            engine.adapted(engine.load(), adapters_of(job.settings))
            engine.load_beside()
        except LdmError as error:
            self._broken[group.weights] = error
            raise
        return engine, settings

    def _metadata(self, engine: Engine, settings: Settings, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        requests = [image_request(job.settings) for job in jobs]
        adapters = adapters_of(jobs[0].settings)  # of all
        info = with_few_steps(engine.info, (adapters,)) if adapters else engine.info
        metadata = make_metadata(engine.load(), engine.placement, settings, requests, info.few)
        self._warn(warnings_of(metadata, shown=len(metadata)))
        for job, of_image in zip(jobs, metadata):
            self._warn(differences(job.source, of_image) if job.source else ())
        return [{**of_image, "job": job.key} for of_image, job in zip(metadata, jobs)]

    def _warn(self, lines: Iterable[str]) -> None:
        for line in lines:
            if line not in self._warned and len(self._warned) < WARNINGS:
                self._warned.add(line)
                console.warn(line)

    def _draw_left(
        self, engine: Engine, settings: Settings, left: dict[int, Job], metadata: list[dict[str, Any]]
    ) -> None:
        """Draw what is `left` until a batch fails; what was drawn, or is the failure's, is taken out of `left`."""
        size, numbers = self._batch_size or planned(engine, settings), list(left)
        batch: list[int] = numbers  # of the batch at work
        began = time.monotonic()

        def watch(rows: Sequence[int], *_step: Any) -> None:
            nonlocal batch
            batch = [numbers[row] for row in rows]

        try:
            drawn = engine.generate(settings, [image_request(left[n].settings) for n in numbers], size, watch)
            for row, image, notes in drawn:
                number = numbers[row]
                seconds = (time.monotonic() - began) / len(batch)
                whole, job = metadata[number] | notes, left.pop(number)
                self._warn(differences(job.source, whole) if job.source else ())  # LoRAs and networks are known now
                self._writer.put(Drawn(job, image, whole, seconds=seconds))
                if not any(number in left for number in batch):
                    self._check_stop()
                    began = time.monotonic()
        except NumericsError as error:  # of the first of the batch that was not given back
            self._fail(left, next(number for number in batch if number in left), error)
        except ResourceError as error:
            self._fail(left, numbers[error.row or 0], error)

    def _check_stop(self) -> None:
        """Between two batches: raise what ends the work."""
        self._writer.check()
        if self._stop.signal:
            raise Interrupted(self._stop.signal, "stopped")

    def _fail(self, left: dict[int, Job], number: int, error: LdmError) -> None:
        self._writer.put(Drawn(left.pop(number), None, {}, error))
        self._check_stop()


def planned(engine: Engine, settings: Settings) -> int:
    """How many images of a group are tried together first."""
    unet = engine.load().unet
    away = engine.placement.home != engine.device
    coming = sum(parameter.nbytes for parameter in unet.parameters()) if away else 0
    return batch_size(engine.info, settings, engine.device, engine.dtype, coming)
