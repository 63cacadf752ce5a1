"""Images and captions by index: drawn scenes or the user's folder, in this process or in workers."""

from __future__ import annotations

import atexit
import re
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldm.config import build, require
from ldm.data.sources import CaptionedFolder
from ldm.device import is_out_of_memory
from ldm.errors import DataError, first_line
from ldm.training.checkpoints.state import last_good
from ldm.training.loop.seeded import generator
from ldm.training.settings import DataSettings

OPTION = re.compile(r"--(layout|split|exclude) ")


class Samples(Protocol):
    """`samples[i]` for any i ≥ 0 is (uint8 (H, W, 3), caption), a function of i and the seed alone."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]: ...

    def captions(self, start: int, count: int) -> list[str]: ...


class EmojiSamples:
    """Scenes drawn from the emoji font."""

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


class FolderSamples:
    """The user's captioned imagefolder, shuffled anew each epoch by (seed, epoch); its last images are held out."""

    def __init__(self, data: DataSettings, seed: int, held_out: bool = False):
        self.folder, self.seed = _opened(data), seed
        count = len(self.folder)
        test = max(1, count // 10) if count > 1 else 0
        self.indices = range(count - test, count) if held_out and test else range(count - test if test else count)
        self.held_out, self._order = held_out, (-1, None)
        self.kept = test

    @property
    def line(self) -> str:
        """How many images are trained on, and which are not."""
        source, count = self.folder.source, len(self.folder)
        ids = f": the last in order, from {source[count - self.kept].id} on" if self.kept else ""
        return f"{count - self.kept} images to train on, {self.kept} held out{ids}"

    def _position(self, index: int) -> int:
        epoch, place = divmod(index, len(self.indices))
        if self.held_out:
            return self.indices[place]
        if self._order[0] != epoch:
            order = torch.randperm(len(self.indices), generator=generator(self.seed, "epoch", epoch))
            self._order = (epoch, order.tolist())
        return self.indices[self._order[1][place]]

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        return self.folder[self._position(index)]

    def captions(self, start: int, count: int) -> list[str]:
        return [self.folder.captions[self._position(i)] for i in range(start, start + count)]


def _opened(data: DataSettings) -> CaptionedFolder:
    reading = {"split": data.split, "layout": data.layout, "exclude": data.exclude}
    try:
        return CaptionedFolder(data.folder, data.resolution, **reading)
    except DataError as error:
        if error.hint:  # an option of the other commands is a setting here
            error = DataError(error.what, where=error.where, hint=OPTION.sub(r"data.\1=", error.hint))
        raise error from None


def open_samples(data: DataSettings, seed: int, held_out: bool = False) -> Samples:
    """The training samples, or those held out from training."""
    return (FolderSamples if data.folder else EmojiSamples)(data, seed, held_out)


class _Indexed(torch.utils.data.Dataset):
    def __init__(self, samples: Samples):
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


def stream(samples: Samples, start: int, batch: int, workers: int) -> Iterator[tuple[Tensor, list[str]]]:
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


def to_float(images: Tensor, device: torch.device) -> Tensor:
    """uint8 (B, H, W, 3) → fp32 (B, 3, H, W) in [-1, 1] on `device`."""
    return images.to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
