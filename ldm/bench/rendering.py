"""A prompt file rendered to PNGs: `ldm.render` against loops over diffusers' pipeline, one by one and in batches."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.bench.timing import Timing, alternate, own_process
from ldm.bench.warm import MAX_DIFFERENCE, peer, require_peer, resolve_device
from ldm.console import hushed
from ldm.errors import NumericsError
from ldm.render.drawing.runner import render

OBJECTS = ("cat", "dog", "red apple", "car", "tree", "fish", "house", "rocket")
BACKGROUNDS = ("red", "blue", "yellow", "green")
NEGATIVE = "a clock"


def rendering(
    repeats: int = 3,
    model: str = "default",
    steps: int = 25,
    sampler: str = "dpmpp_2m",
    guidance_scale: float = 4.0,
    dtype: str = "fp32",
    device: str = "cpu",
    images: int = 16,
    batch_size: int = 8,
) -> Timing:
    """Time a file of `images` lines in alternation; folder, noise, sampler, steps, dtype and threads are equal.

    Each side has a process with the model in memory, because `ldm.render` changes how its process allocates memory,
    which would help diffusers too. Every line has a seed, every other line a negative prompt. All sides write PNGs.
    Raises ConfigError for a sampler that diffusers does not have, ModelError where `model` is no folder, and
    NumericsError where images in fp32 differ by more than 2 levels of 255.
    """
    require_peer(sampler)
    device, dtype = resolve_device(device, dtype)
    lines = _lines(images)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    peer_arguments = (model, dtype, device, sampler)
    with (
        tempfile.TemporaryDirectory() as root,
        hushed(),
        own_process() as ldm_process,
        own_process() as diffusers_process,
    ):
        diffusers_process(_render_diffusers, peer_arguments, (), Path(root), 1, call)  # only loads the pipeline
        given = {"model": model, "dtype": dtype, "device": device, "sampler": sampler, "batch_size": batch_size, **call}

        def loop(size: int) -> Callable[[], Path]:
            return lambda: diffusers_process(_render_diffusers, peer_arguments, lines, _folder(root), size, call)

        sides: dict[str, Callable[[], Path]] = {
            "ldm.render": lambda: ldm_process(_render_ldm, lines, _folder(root), given),
            f"diffusers in batches of {batch_size}": loop(batch_size),
            "diffusers one by one": loop(1),
        }
        difference = _largest_difference([draw() for draw in sides.values()], MAX_DIFFERENCE[dtype])
        seconds = alternate(sides, repeats, warmup=0)  # each has run once
    settings = {"model": model, "images": images, "batch_size": batch_size, "sampler": sampler, **call, "dtype": dtype}
    settings |= {"device": device, "threads": torch.get_num_threads()}
    timing = Timing("render", seconds, settings, {"largest difference of 255": difference})
    ours, batches, one_by_one = timing.medians.values()
    faster = {"times as fast as one by one": one_by_one / ours, "times as fast as in batches": batches / ours}
    return Timing("render", seconds, settings, {**timing.agreement, **faster})


def _lines(count: int) -> list[dict[str, Any]]:
    texts = (f"a {OBJECTS[i % 8]} on a {BACKGROUNDS[i // 8 % 4]} background" for i in range(count))
    lines = [{"prompt": text, "seed": 100 + i, "name": f"{i:03d}"} for i, text in enumerate(texts)]
    return [line | ({"negative_prompt": NEGATIVE} if i % 2 else {}) for i, line in enumerate(lines)]


def _folder(root: str) -> Path:
    """A new folder for a run."""
    return Path(tempfile.mkdtemp(dir=root))


def _render_ldm(lines: Sequence[dict[str, Any]], folder: Path, settings: dict[str, Any]) -> Path:
    with hushed():
        render(lines, folder, **settings)
    return folder


def _render_diffusers(
    peer_arguments: tuple[str, ...], lines: Sequence[dict[str, Any]], folder: Path, size: int, call: dict[str, Any]
) -> Path:
    """The usual loop: one call for every `size` lines, then their images are saved."""
    pipe = _pipe(*peer_arguments)
    for start in range(0, len(lines), size):
        batch = lines[start : start + size]
        output = pipe(
            [line["prompt"] for line in batch],
            negative_prompt=[line.get("negative_prompt", "") for line in batch],
            generator=[torch.Generator("cpu").manual_seed(line["seed"]) for line in batch],
            **call,
        )
        for line, image in zip(batch, output.images):
            image.save(folder / f"{line['name']}.png")
    return folder


@functools.cache
def _pipe(*peer_arguments: str) -> Any:
    with hushed():
        return peer(*peer_arguments)


def _largest_difference(folders: Sequence[Path], limit: float) -> float:
    """The largest difference between the first folder's images and the others', in levels of 255.

    Raises NumericsError above the limit.
    """
    largest = 0.0
    for path in sorted(folders[0].glob("*.png")):
        first, *others = (np.asarray(Image.open(folder / path.name)).astype(float) for folder in folders)
        largest = max(largest, *(float(np.abs(first - pixels).max()) for pixels in others))
    if largest > limit:
        raise NumericsError(f"the images differ by {largest:.0f} of 255", where="render")
    return largest
