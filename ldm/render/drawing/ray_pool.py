"""Drawing on a Ray cluster: workers draw whole batches and encode them, this process alone writes files and lines."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from ldm import console
from ldm.console import StopRequest
from ldm.errors import ConfigError, Interrupted, ResourceError
from ldm.render.drawing.batch_renderer import BatchRenderer
from ldm.render.drawing.writer import Drawn, Encode, Writer
from ldm.render.jobs.batches import MOST, groups, windows
from ldm.render.jobs.jobs import Job
from ldm.render.jobs.resolve import Resolver

LOSSES = 3  # workers that may be lost with the same images before these are given up
CONNECT = 10.0  # seconds that a cluster has to answer
WAIT = 1.0  # seconds after which signals and the writer are looked at


def check_ray(address: str) -> None:
    """Raise ConfigError for what is no address, and where Ray is not installed; imports nothing."""
    if not isinstance(address, str) or not address.strip():
        hint = 'give "local", "auto" or host:port'
        raise ConfigError(f"expected an address, got {address!r:.80}", where="ray", hint=hint)
    if importlib.util.find_spec("ray") is None:
        hint = "pip install 'ldm-pipeline[ray]', or leave --ray out"
        raise ConfigError("the package ray is not installed", where="ray", hint=hint)


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connected to a cluster while the block runs: "local" starts one on this machine, "auto" and host:port join one.

    A connection that is there already is used and stays. Raises ConfigError where there is no cluster.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with _keep_sigterm():
            _connect(address)
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    import ray

    local = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "/" not in address:  # where nobody listens, Ray itself waits many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT).close()
        ray.init(address=address, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises plain ones too
        reason = str(error).partition("\n")[0].partition(". ")[0]
        hint = 'start one (ray start --head), or give "local"'
        hint = "see /tmp/ray/session_latest/logs" if local else hint
        raise ConfigError(f"no Ray cluster at {address} ({reason})", where="ray", hint=hint) from None


@contextlib.contextmanager
def _keep_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM, which Ray would replace."""
    here = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if here:
            signal.signal(signal.SIGTERM, handler)


class Worker:
    """Draws and encodes in another process, with as many threads as the driver: so the bytes are the same."""

    def __init__(self, threads: int, folder: str, encode: Encode, resolver: Resolver, batch_size: int | None):
        torch.set_num_threads(threads)
        with contextlib.suppress(OSError):  # another machine; paths that are not relative work there too
            os.chdir(folder)
        self._encoder = RayEncoder(encode, threads)
        self._renderer = BatchRenderer(resolver, self._encoder, StopRequest(), batch_size)

    def ready(self) -> None:
        """Answers as soon as the worker is there."""

    def draw(self, jobs: list[Job]) -> list[Drawn]:
        """What became of each job, images as the bytes of their files."""
        self._renderer.draw(jobs)
        return self._encoder.take()


class RayEncoder:
    """A worker's writer: encodes images while the next ones are drawn, and keeps them until they are fetched."""

    def __init__(self, encode: Encode, threads: int):
        self._encode, self._pool = encode, ThreadPoolExecutor(threads)
        self._done: list[Future[Drawn]] = []

    def put(self, drawn: Drawn) -> None:
        self._done.append(self._pool.submit(self._encoded, drawn))

    def check(self) -> None:
        """Nothing is written here."""

    def take(self) -> list[Drawn]:
        done, self._done = self._done, []
        return [future.result() for future in done]

    def _encoded(self, drawn: Drawn) -> Drawn:
        return drawn if drawn.error else replace(drawn, image=self._encode(drawn), metadata=drawn.remarks)


@dataclass
class JobBatch:
    """Jobs that a worker draws at once."""

    jobs: list[Job]
    losses: int = 0  # workers that were lost with it


class RayPool:
    """Ray's workers, who draw for one writer as a BatchRenderer does. Needs a connection (see `cluster`).

    encode  how images become files
    count   how many jobs there are

    Lost batches are handed out here and not by Ray's own max_task_retries: that waits for the actor which was lost,
    without end where its machine is gone and no other has room; and it does not say which image kills its workers.
    """

    def __init__(
        self, resolver: Resolver, writer: Writer, stop: StopRequest, batch_size: int | None, encode: Encode, count: int
    ):
        import ray

        threads = torch.get_num_threads()
        kind, most, needs = places(ray.cluster_resources(), resolver.device, threads)
        number = min(most, count)
        self._writer, self._stop = writer, stop
        self._size = batch_size or min(MOST[kind], -(-count // number))
        actor = ray.remote(Worker).options(max_restarts=-1, **needs)
        self._workers = [actor.remote(threads, os.getcwd(), encode, resolver, batch_size) for _ in range(number)]
        self._waiting: deque[JobBatch] = deque()
        self._calls: dict[Any, tuple[Any, JobBatch | None]] = {}  # Ray's reference -> to whom, with what (None: ready?)
        self._idle: list[Any] = []
        console.say(f"Ray: {number} workers on {kind}, {threads} threads each")

    def draw(self, jobs: Iterable[Job]) -> None:
        """All of them, in whole batches; what a lost worker had in hand goes to others.

        Raises Interrupted after the batches in which a signal came, WriterStopped, and ResourceError without workers.
        """
        import ray

        try:
            for worker in self._workers:
                self._ask(worker)
            self._draw(job_batches(jobs, self._size))
        finally:
            for worker in self._workers:
                ray.kill(worker)
        if self._stop.signal:
            raise Interrupted(self._stop.signal, "stopped")

    def _draw(self, coming: Iterator[JobBatch]) -> None:
        import ray

        while True:
            self._writer.check()
            if self._stop.signal:  # what is in hand is finished
                coming = iter(())
                self._waiting.clear()
            self._waiting.extend(islice(coming, 0 if self._waiting else 1))
            if not self._waiting and not any(batch for _, batch in self._calls.values()):
                return
            if self._waiting and self._idle:
                worker, batch = self._idle.pop(), self._waiting.popleft()
                self._calls[worker.draw.remote(batch.jobs)] = worker, batch
                continue
            for call in ray.wait(list(self._calls), timeout=WAIT)[0]:
                self._answered(call, *self._calls.pop(call))

    def _ask(self, worker: Any) -> None:
        """Whether it is ready; the answer comes once a lost one has been replaced."""
        self._calls[worker.ready.options(max_task_retries=-1).remote()] = worker, None

    def _answered(self, call: Any, worker: Any, batch: JobBatch | None) -> None:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            drawn = ray.get(call)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            console.say(str(error), verbosity=1)
            self._lost(worker, batch, error)
            return
        self._idle.append(worker)
        for one in drawn or ():
            self._writer.put(one)

    def _lost(self, worker: Any, batch: JobBatch | None, error: Exception) -> None:
        """Have a worker replaced, and what it had in hand drawn by others; one that cannot even start is given up."""
        if batch is None:
            reason = str(error).strip().rpartition("\n")[2]
            console.warn(f"a worker cannot start ({reason:.200})")
            if not self._idle and not self._calls:
                raise ResourceError("no worker of the cluster is left", where="ray", hint="see Ray's logs")
            return
        console.warn(f"a worker was lost; the {len(batch.jobs)} images that it had in hand go to others")
        self._ask(worker)
        losses = batch.losses + 1
        if losses < LOSSES:
            self._waiting.append(JobBatch(batch.jobs, losses))
        elif len(batch.jobs) > 1:  # it may be the fault of one of them
            self._waiting.extend(JobBatch([job], losses - 1) for job in batch.jobs)
        else:
            what = f"{losses} workers were lost while they drew it"
            self._writer.put(Drawn(batch.jobs[0], None, {}, ResourceError(what, hint="see Ray's logs")))


def places(resources: Mapping[str, float], device: str, threads: int) -> tuple[str, int, dict[str, int]]:
    """(cpu or cuda, how many workers there is room for, what each needs) in a cluster. Raises ConfigError without room.

    Where there are GPUs, a worker has one to itself; elsewhere it has as many cores as threads.
    """
    gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if device.startswith("cuda") and not gpus:
        raise ConfigError("the cluster has no GPU", where="device", hint="leave it out, or use cpu")
    if gpus and (device == "auto" or device.startswith("cuda")):
        return "cuda", gpus, {"num_gpus": 1, "num_cpus": 1}
    if cores < threads:
        hint = f"OMP_NUM_THREADS={max(cores, 1)} draws with less"
        raise ConfigError(f"the cluster has {cores} cores, and a worker needs {threads}", where="ray", hint=hint)
    return "cpu", cores // threads, {"num_cpus": threads}


def job_batches(jobs: Iterable[Job], size: int) -> Iterator[JobBatch]:
    """Jobs that may share a batch, at most so many at once, in an order in which models change seldom."""
    last = None
    for window in windows(jobs):
        for group, members in groups(window, last):
            last = group
            yield from (JobBatch(members[start : start + size]) for start in range(0, len(members), size))
