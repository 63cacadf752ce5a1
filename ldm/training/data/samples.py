"""Drawn scenes by index, in this process or in workers."""

from __future__ import annotations

import atexit
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.config import build, require
from ldm.device import is_out_of_memory
from ldm.errors import DataError, first_line
from ldm.training.checkpoints.state import last_good
from ldm.training.settings import DataSettings


class EmojiSamples:
    """Scenes of the emoji font: `samples[i]` is (uint8 (H, W, 3), caption), a function of i and the seed alone."""

    def __init__(self, data: DataSettings, seed: int, held_out: bool = False):
        from ldm.data.emoji import SceneConfig, Scenes

        require("held_out" not in data.scenes, "is set by the stages, which draw both", "data.scenes.held_out")
        config = build(SceneConfig, {**data.scenes, "resolution": data.resolution, "held_out": held_out}, "data.scenes")
        self.scenes = Scenes(config, seed, font=data.font)

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        scene = self.scenes[index]
        return scene.image, scene.caption

    def captions(self, start: int, count: int) -> list[str]:
        return [self.scenes.caption(i) for i in range(start, start + count)]


class _Indexed(torch.utils.data.Dataset):
    def __init__(self, samples: EmojiSamples):
        self.samples = samples

    def __getitem__(self, index: int) -> tuple[np.ndarray, str] | DataError:
        try:
            return self.samples[index]
        except DataError as error:  # returned, for what a worker raises ends in a page of traceback
            return error


def _collate(items: Sequence[tuple[np.ndarray, str] | DataError]) -> tuple[Tensor, list[str]] | DataError:
    bad = [item for item in items if isinstance(item, DataError)]
    if bad:
        return bad[0]
    images = torch.from_numpy(np.stack([image for image, _ in items]))
    return images, [caption for _, caption in items]


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches the whole process group; the run finishes its step, so its workers must not die first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


_workers: weakref.WeakSet = weakref.WeakSet()  # of all streams, as long as multiprocessing knows of them


@atexit.register
def _kill_workers() -> None:
    """At the end of the process, which would wait for ever for the workers of a stream that was not closed."""
    if _workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for worker in list(_workers):
        worker.kill()


def stream(samples: EmojiSamples, start: int, batch: int, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless (uint8 (B, H, W, 3), captions) from index `start` on, in order whatever the number of workers.

    Raises DataError for an image that cannot be read, at its place in the order, and where a worker is gone.
    """
    loader = torch.utils.data.DataLoader(
        _Indexed(samples),
        sampler=range(start, 1 << 40),
        batch_size=batch,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_leave_signals_to_the_parent,
        generator=torch.Generator(),  # its own, so that the global one is not touched
        prefetch_factor=2 if workers else None,
        timeout=300 if workers else 0,
    )
    batches, place = iter(loader), start
    if workers:
        _workers.update(batches._workers)
    while True:
        try:
            samples_or_error = next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            if not workers or is_out_of_memory(error) or str(error).startswith("Caught "):  # it came from a sample
                raise
            if not _is_lost(error):
                with suppress(RuntimeError):  # PyTorch's handler of SIGCHLD raises one wherever it comes
                    time.sleep(1)
            hint = "go on with --resume latest (workers=0 needs none)"
            raise _gone(error, f"from sample {place} on", hint) from None
        if isinstance(samples_or_error, DataError):
            raise samples_or_error
        yield samples_or_error
        place += batch


@contextmanager
def lost_workers(out: Path) -> Iterator[None]:
    """Turn the error that PyTorch raises anywhere when a worker is killed into DataError with exit code 5."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        raise _gone(error, out, f"{last_good(out)}, go on with --resume latest (workers=0 needs none)") from None


def _is_lost(error: Exception) -> bool:
    return str(error).startswith("DataLoader worker (pid")


def _gone(error: Exception, where: object, hint: str) -> DataError:
    gone = DataError(f"a process that makes samples was killed, or hangs ({first_line(error)})", where=where, hint=hint)
    gone.exit_code = 5
    return gone
