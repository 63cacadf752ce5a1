"""The queue: jobs that wait, and the one thread that draws them.

Jobs of the page and of /api/jobs are in the ledger: they survive a restart, and a job that was at work goes on with the
images that it lacks (their seeds are decided when it is taken, so that they are the same images). A call that waits for
its answer is in memory alone, and ends with its client.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm import console
from ldm.errors import LdmError
from ldm.images import Metadata, encode
from ldm.pipeline.metadata import parameters
from ldm.render.sheets.axes import read_axes
from ldm.render.sheets.grid_sheet import draw_sheet
from ldm.web import limits
from ldm.web.events import Events
from ldm.web.limits import Refused
from ldm.web.request import Checked, Reader, public
from ldm.web.store import Store, new_id

TOGETHER = 4  # images of one call of generate: after so many they are files, whatever comes then
PREVIEW_SECONDS = 0.2  # between two previews
FINISHED = ("done", "failed", "cancelled")
LOOPBACK = ("127.0.0.1", "::1", "testclient")


@dataclass
class Job:
    """What is to be drawn, and how far it is. The drawing thread alone changes it once it runs."""

    id: str
    client: str
    address: str
    created: float
    checked: Checked
    keep: bool  # whether its images go to the gallery
    state: str = "queued"
    error: str | None = None
    step: int = 0  # of all
    steps: int = 0
    started: float | None = None
    images: list[str] = field(default_factory=list)  # ids in the gallery
    results: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)  # (image, metadata) where it keeps none
    previews: list[Any] = field(default_factory=list)
    stopped: bool = False
    finished: threading.Event = field(default_factory=threading.Event)
    on_finish: Callable[[], None] = lambda: None

    def public(self) -> dict[str, Any]:
        """What clients are shown."""
        done = self.step / self.steps if self.steps else 0.0
        spent = time.time() - self.started if self.started else 0.0
        remaining = spent / done - spent if done > 0.02 and self.state == "running" else None
        return {
            "id": self.id,
            "created": self.created,
            "state": self.state,
            "error": self.error,
            "step": self.step,
            "steps": self.steps,
            "progress": round(done, 4),
            "seconds_left": None if remaining is None else round(remaining, 1),
            "images": list(self.images),
            "total": self.checked.images,
            "width": self.checked.size[0],
            "height": self.checked.size[1],
            "request": self.checked.fields,
        }


class Queue:
    """Jobs in their order, drawn by one thread, which `start` starts and `close` ends."""

    def __init__(self, store: Store, reader: Reader, events: Events, debug: bool = False):
        self._store, self._reader, self._events, self._debug = store, reader, events, debug
        self._jobs: dict[str, Job] = {}  # waiting and running
        self._served: dict[str, float] = {}  # client -> when a job of it began last
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ldm-web-draw", daemon=True)
        self.current: Job | None = None

    def start(self) -> None:
        """Take up what an earlier server left, and begin to draw."""
        for id, client, created, request in self._store.unfinished():
            try:
                job = Job(id, client, "127.0.0.1", created, Checked(**request), True)
            except TypeError:  # another version's
                self._store.set_state(id, "failed", "was left by another version of ldm")
                continue
            job.steps = _steps(job.checked)
            self._jobs[id] = job
            self._store.set_state(id, "queued")
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """End the thread after the step that it is at; False where it is still at work after `seconds`."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def submit(self, checked: Checked, client: str, address: str, keep: bool = True, **options: Any) -> Job:
        """Put a job at the end. Raises Refused: 429 where too many wait, 507 where the disk is full."""
        if keep:
            self._store.require_room()
        job = Job(new_id(), client, address, time.time(), checked, keep, **options)
        job.steps = _steps(checked)
        with self._changed:
            waiting = [one for one in self._jobs.values() if one.state == "queued"]
            if len(waiting) >= limits.MAX_QUEUED or self._closing:
                raise Refused(429, f"{len(waiting)} jobs are waiting", hint="try again later")
            same = sum(one.address == address for one in waiting)
            if address not in LOOPBACK and same >= limits.MAX_PER_ADDRESS:
                raise Refused(429, f"{same} jobs of this address are waiting", hint="wait for one of them")
            if keep:
                self._store.save_job(job.id, client, job.created, asdict(checked))
            self._jobs[job.id] = job
            self._changed.notify_all()
        self._tell(job)
        return job

    def stop(self, id: str) -> bool:
        """End a job: at once where it waits, after its step where it runs. False for one that is unknown or over."""
        with self._changed:
            job = self._jobs.get(id)
            if job is None:
                return False
            job.stopped = True
            if job.state == "queued":
                self._end(job, "cancelled")
        return True

    def listed(self) -> list[Job]:
        """The job at work, then those that wait, in the order in which they will be drawn."""
        with self._changed:
            order, served = [], dict(self._served)
            waiting = [job for job in self._jobs.values() if job.state == "queued"]
            while waiting:
                job = _next(waiting, served)
                served[job.client] = time.time() + len(order)
                waiting.remove(job)
                order.append(job)
            return [self.current, *order] if self.current is not None else order

    def find(self, id: str) -> Job | None:
        return self._jobs.get(id)

    # in the drawing thread

    def _run(self) -> None:
        with contextlib.suppress(LdmError):  # which the first job will say
            self._reader.warm()
        while (job := self._take()) is not None:
            try:
                for _ in self._draw(job):
                    if job.stopped or self._closing or time.time() - (job.started or 0) > limits.JOB_SECONDS:
                        break
            except LdmError as error:
                self._finish(job, "failed", public(error))
            except Exception as error:
                if self._debug:
                    traceback.print_exc()
                console.warn(f"job {job.id}: internal error: {type(error).__name__}")
                self._finish(job, "failed", "internal error (a bug; the server's --debug shows where)")
            else:
                self._conclude(job)

    def _take(self) -> Job | None:
        with self._changed:
            while True:
                if self._closing:
                    return None
                waiting = [job for job in self._jobs.values() if job.state == "queued"]
                if waiting:
                    break
                self._changed.wait()
            job = _next(waiting, self._served)
            job.state, job.started = "running", time.time()
            self._served[job.client] = job.started
            if len(self._served) > 1000:
                self._served.pop(next(iter(self._served)))
            self.current = job
        if job.keep:
            self._store.set_state(job.id, "running")
        self._tell(job)
        return job

    def _conclude(self, job: Job) -> None:
        if job.stopped:
            self._finish(job, "cancelled")
        elif len(job.images) + len(job.results) >= job.checked.images:
            self._finish(job, "done")
        elif self._closing:  # stays in the ledger, to be gone on with
            with self._changed:
                self.current = None
                job.state = "queued"
            job.finished.set()
            job.on_finish()
        else:
            self._finish(job, "failed", f"took more than {limits.JOB_SECONDS} seconds")

    def _finish(self, job: Job, state: str, error: str | None = None) -> None:
        with self._changed:
            self.current = None
            self._end(job, state, error)

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        job.state, job.error, job.previews = state, error, []
        self._jobs.pop(job.id, None)
        if job.keep:
            self._store.set_state(job.id, state, error)
        self._tell(job)
        job.finished.set()
        job.on_finish()

    def _tell(self, job: Job) -> None:
        if job.keep:
            self._events.publish("job", job.public())

    def _draw(self, job: Job) -> Iterator[None]:
        """Draw what the job lacks, a few images at a time; yields after each step."""
        number = 0
        for cell, seeds, variations, steps in _cells(job.checked):
            pipe = self._reader.pipeline(cell)
            lacking = []
            for k in range(len(seeds)):
                if job.keep and self._store.has_image(f"{job.id}-{number + k}"):
                    job.images.append(f"{job.id}-{number + k}")
                    job.step += steps
                else:
                    lacking.append(k)
            for part in (lacking[i : i + TOGETHER] for i in range(0, len(lacking), TOGETHER)):
                call = {**self._reader.call(cell), "seed": [seeds[k] for k in part], "num_images": len(part)}
                if variations:
                    call["variation_seed"] = [variations[k] for k in part]
                before = job.step
                stream = pipe.stream(**call, batch_size=TOGETHER)
                try:
                    for step in stream:
                        if step.images is not None:
                            self._save(job, [number + k for k in part], step.images)
                            continue
                        job.step = min(before + (step.index + 1) * len(part), before + steps * len(part))
                        self._show(job, [number + part[row] for row in step.rows], step)
                        yield
                finally:
                    stream.close()
                job.step = before + steps * len(part)
                yield
            number += len(seeds)
        if "grid" in job.checked.fields and len(job.images) == number:
            self._save_sheet(job)

    def _show(self, job: Job, numbers: list[int], step: Any) -> None:
        """Tell how far a job is, with previews where somebody listens."""
        now = time.monotonic()
        last = getattr(self, "_shown", 0.0)
        if not self._events.heard or now - last < PREVIEW_SECONDS:
            if not job.keep:
                job.previews = [step]
            return
        self._shown = now
        previews = [_data_url(image) for image in step.previews] if job.keep else []
        self._events.publish("progress", {**job.public(), "numbers": numbers, "previews": previews})

    def _save(self, job: Job, numbers: list[int], images: Any) -> None:
        for i, number in enumerate(numbers[: len(images)]):
            image, metadata = images[i], without_paths(images.metadata[i])
            if not job.keep:
                job.results.append((image, metadata))
                continue
            id = f"{job.id}-{number}"
            data = encode(image, "png", Metadata(parameters(metadata), metadata))
            shown = {**metadata, "request": job.checked.fields, "parameters": parameters(metadata)}
            self._store.add_image(id, job.id, data, image.size, shown)
            job.images.append(id)
            self._events.publish("image", {"id": job.id, "image": self._store.image(id)})

    def _save_sheet(self, job: Job) -> None:
        """The grid's images beside labelled axes, as one more image."""
        id, fields = f"{job.id}-{job.checked.images}", job.checked.fields
        if self._store.has_image(id):
            return
        sources = [io.BytesIO(self._store.image_bytes(one) or b"") for one in job.images]
        sheet = draw_sheet(read_axes(fields["grid"]), [_image(source) for source in sources], fields["prompt"])
        shown = {"prompt": fields["prompt"], "request": fields}
        self._store.add_image(id, job.id, encode(sheet), sheet.size, shown, kind="grid")
        self._events.publish("image", {"id": job.id, "image": self._store.image(id)})


def _image(source: io.BytesIO) -> Any:
    from PIL import Image

    try:
        with Image.open(source, formats=("PNG",)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError):
        return None


def _cells(checked: Checked) -> list[tuple[dict[str, Any], list[int], list[int] | None, int]]:
    return list(zip(checked.cells, checked.seeds, checked.variations, checked.steps))


def _steps(checked: Checked) -> int:
    return sum(steps * len(seeds) for steps, seeds in zip(checked.steps, checked.seeds))


def _next(waiting: list[Job], served: dict[str, float]) -> Job:
    """The oldest job of the client that has waited longest since one of its jobs began."""
    return min(waiting, key=lambda job: (served.get(job.client, 0.0), job.created))


def without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as other machines may see it: of LoRAs, parts and images the names of the files alone."""
    shown = dict(metadata)
    if shown.get("lora"):
        shown["lora"] = [{**one, "path": _name(one.get("path", ""))} for one in shown["lora"]]
    if shown.get("vae"):
        shown["vae"] = _name(shown["vae"])
    if shown.get("text_encoders"):
        shown["text_encoders"] = list(map(_name, shown["text_encoders"]))
    return shown


def _name(path: Any) -> str:
    return str(path).rpartition("/")[2]


def _data_url(image: Any) -> str:
    import base64

    return "data:image/png;base64," + base64.b64encode(encode(image)).decode("ascii")
