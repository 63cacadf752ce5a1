"""A prompt file to PNG files: `ldm.render` against loops over diffusers' pipeline, one by one and in batches."""

from __future__ import annotations

import functools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.bench.timing import Timing, alternate
from ldm.bench.warm import APART, peer, require_peer, settled
from ldm.console import hushed
from ldm.errors import NumericsError

THINGS = ("cat", "dog", "red apple", "car", "tree", "fish", "house", "rocket")
GROUNDS = ("red", "blue", "yellow", "green")
NEGATIVE = "a clock"


def rendering(
    repeats: int = 3,
    model: str = "default",
    steps: int = 25,
    sampler: str = "dpmpp_2m",
    guidance_scale: float = 4.0,
    dtype: str = "fp32",
    device: str = "cpu",
    pictures: int = 16,
    batch_size: int = 8,
) -> Timing:
    """Time a file of `pictures` lines by turns: same folder, noise, sampler, steps, dtype, threads; all write PNGs.

    We and diffusers have a process each, with the model in memory: `ldm.render` tells its process how to keep memory,
    from which diffusers shall not gain. Every line has a seed, every other one a negative prompt of its own. Raises
    ConfigError for a sampler that diffusers has no equal of, ModelError where `model` is no folder, and NumericsError
    where a picture in fp32 is more than 2 levels of 255 apart: then there is nothing to time.
    """
    import torch

    require_peer(sampler)
    device, dtype = settled(device, dtype)
    lines = _lines(pictures)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    whose = (model, dtype, device, sampler)
    with tempfile.TemporaryDirectory() as place, hushed(), _process() as ours, _process() as peers:
        peers(_ready, whose)
        folders = _Folders(Path(place))
        words = {"model": model, "dtype": dtype, "device": device, "sampler": sampler, "batch_size": batch_size, **call}
        sides: dict[str, Callable[[], Path]] = {
            "ldm.render": lambda: ours(_ours, lines, folders.new(), words),
            f"diffusers in batches of {batch_size}": lambda: peers(
                _theirs, whose, lines, folders.new(), batch_size, call
            ),
            "diffusers one by one": lambda: peers(_theirs, whose, lines, folders.new(), 1, call),
        }
        apart = _largest_difference([draw() for draw in sides.values()], APART[dtype])
        seconds = alternate(sides, repeats, warmup=0)  # each has run once
    told = {"model": model, "pictures": pictures, "batch_size": batch_size, "sampler": sampler, **call, "dtype": dtype}
    told |= {"device": device, "threads": torch.get_num_threads()}
    found = Timing("render", seconds, told, {"largest difference of 255": apart})
    ours, batches, loop = found.medians.values()
    faster = {"times as fast as one by one": loop / ours, "times as fast as in batches": batches / ours}
    return Timing("render", seconds, told, {**found.agreement, **faster})


def _lines(count: int) -> list[dict[str, Any]]:
    texts = (f"a {THINGS[i % 8]} on a {GROUNDS[i // 8 % 4]} background" for i in range(count))
    lines = [{"prompt": text, "seed": 100 + i, "name": f"{i:03d}"} for i, text in enumerate(texts)]
    return [line | ({"negative_prompt": NEGATIVE} if i % 2 else {}) for i, line in enumerate(lines)]


class _Folders:
    """A new folder for every run."""

    def __init__(self, place: Path):
        self._place, self._count = place, 0

    def new(self) -> Path:
        self._count += 1
        folder = self._place / str(self._count)
        folder.mkdir()
        return folder


@contextmanager
def _process() -> Iterator[Callable[..., Any]]:
    """What calls a function in a process that lives as long as this context, with as many threads as here."""
    import torch

    kind = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, kind, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()


def _ours(lines: Sequence[dict[str, Any]], folder: Path, words: dict[str, Any]) -> Path:
    from ldm.render.drawing.runner import render

    with hushed():
        render(lines, folder, **words)
    return folder


def _theirs(
    whose: tuple[str, ...], lines: Sequence[dict[str, Any]], folder: Path, size: int, call: dict[str, Any]
) -> Path:
    """A loop as one writes it: a call for every `size` lines, then their pictures saved."""
    import torch

    pipe = _pipe(*whose)
    for start in range(0, len(lines), size):
        some = lines[start : start + size]
        drawn = pipe(
            [line["prompt"] for line in some],
            negative_prompt=[line.get("negative_prompt", "") for line in some],
            generator=[torch.Generator("cpu").manual_seed(line["seed"]) for line in some],
            **call,
        )
        for line, image in zip(some, drawn.images):
            image.save(folder / f"{line['name']}.png")
    return folder


@functools.cache
def _pipe(*whose: str) -> Any:
    with hushed():
        return peer(*whose)


def _ready(whose: tuple[str, ...]) -> None:
    """Raises what `peer` raises, before anything is drawn."""
    _pipe(*whose)


def _largest_difference(folders: Sequence[Path], limit: float) -> float:
    """Between the first folder's pictures and those of the others, in levels of 255. Raises NumericsError above it."""
    import numpy as np
    from PIL import Image

    largest = 0.0
    for path in sorted(folders[0].glob("*.png")):
        one, *others = (np.asarray(Image.open(folder / path.name)).astype(float) for folder in folders)
        largest = max(largest, *(float(np.abs(one - other).max()) for other in others))
    if largest > limit:
        raise NumericsError(f"the pictures differ by {largest:.0f} of 255", where="render")
    return largest
