"""`Pipeline.stream`: a call of generate seen while it works."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

import torch
from PIL import Image

from ldm.images import grid, to_pil
from ldm.nn.preview import preview
from ldm.nn.vae import VAE
from ldm.pipeline.result import Images


@dataclass(frozen=True)
class Step:
    """One step of one batch."""

    index: int  # among the steps of its batch, from 0
    rows: tuple[int, ...]  # which of the call's images, from 0
    x0: torch.Tensor  # (B, C, h, w): what the network takes the images to become
    vae: VAE
    images: Images | None = None  # the finished images, on the very last Step alone

    @property
    def previews(self) -> list[Image.Image]:
        """x0 as small images, one pixel a latent, by a map that is fitted to the VAE when it is first used."""
        return to_pil(preview(self.vae, self.x0))

    @torch.no_grad()
    def decode(self) -> list[Image.Image]:
        """x0 as whole images, by the VAE: what would come out if the work ended here."""
        return to_pil(self.vae.decode(self.x0))

    @property
    def preview(self) -> Image.Image:
        """All of them on one sheet."""
        return grid(self.previews)


class Listener:
    """A callback of generate that also gets the numbers of the images that a step belongs to."""

    def __init__(self, callback: Callable | None):
        self._callback = callback
        self.received: SimpleQueue[Any] = SimpleQueue()
        self.closed = False

    def __call__(self, rows: Sequence[int], i: int, x: torch.Tensor, x0: torch.Tensor) -> bool:
        """Whether the work is to end."""
        ends = self._callback is not None and self._callback(i, x, x0) is True
        self.received.put((i, tuple(rows), x0.clone()))
        return self.closed or ends


def stream(generate: Callable[[Listener], Images], callback: Callable | None, vae: Callable[[], VAE]) -> Iterator[Step]:
    """The steps of generate(listener), which runs in a thread; the last one comes again with the finished images.

    Its errors are raised here. Closing the iterator, or an error or Ctrl-C in the loop over it, stops the work.
    """
    listener, step = Listener(callback), None

    def work() -> None:
        try:
            listener.received.put(generate(listener))
        except BaseException as error:  # belongs to whoever reads the steps
            listener.received.put(error)

    worker = threading.Thread(target=work, name="ldm-stream", daemon=True)
    worker.start()
    try:
        while isinstance(received := listener.received.get(), tuple):
            i, rows, x0 = received
            step = Step(i, rows, x0, vae())
            yield step
        if isinstance(received, BaseException):
            raise received
        if step is not None:
            yield replace(step, images=received)
    finally:
        listener.closed = True
        worker.join()
