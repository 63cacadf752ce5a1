"""A prompt file rendered to PNGs: `ldm.render` against loops over diffusers' pipeline, one by one and in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.bench.timing import OURS, PEER, Row, Side, Work, new_folder
from ldm.bench.warm import MAX_DIFFERENCE, check_steps, peer, pixels, placed
from ldm.render.drawing.runner import render

OBJECTS = ("cat", "dog", "red apple", "car", "tree", "fish", "house", "rocket")
BACKGROUNDS = ("red", "blue", "yellow", "green")
NEGATIVE = "a clock"
ONE_BY_ONE = "diffusers one by one"


def render_row(
    model: str = "default",
    steps: int = 25,
    sampler: str = "dpmpp_2m",
    guidance_scale: float = 4.0,
    dtype: str = "fp32",
    device: str = "cpu",
    images: int = 16,
    batch_size: int = 8,
    quick: bool = False,
) -> Row:
    """A file of `images` lines; folder, noise, sampler, steps, dtype and threads are equal.

    Every line has a seed, every other line a negative prompt. diffusers draws in batches of as many, and (but
    for `quick`) one by one.
    Raises as `warm_row`.
    """
    device, dtype, needs = placed(model, sampler, device, dtype)
    images, batch_size = (min(images, 2), min(batch_size, 2)) if quick else (images, batch_size)
    call = {"num_inference_steps": check_steps(steps), "guidance_scale": guidance_scale}
    given = {"model": model, "dtype": dtype, "device": device, "sampler": sampler, "batch_size": batch_size, **call}
    lines, arguments = _lines(images), (model, dtype, device, sampler)
    sides = {OURS: Side(render_ldm, (lines, given), needs)}
    sides[PEER] = Side(render_diffusers, (arguments, lines, call, batch_size), needs)
    if not quick:
        sides[ONE_BY_ONE] = Side(render_diffusers, (arguments, lines, call, 1), needs)
    settings = {"model": model, "images": images, "batch_size": batch_size, "sampler": sampler, **call, "dtype": dtype}
    settings |= {"device": device, "threads": torch.get_num_threads()}
    left_out = {ONE_BY_ONE: "not with --quick"} if quick else {}
    return Row("render", "a prompt file", sides, settings, MAX_DIFFERENCE[dtype], device=device, left_out=left_out)


def _lines(count: int) -> list[dict[str, Any]]:
    texts = (f"a {OBJECTS[i % 8]} on a {BACKGROUNDS[i // 8 % 4]} background" for i in range(count))
    lines = [{"prompt": text, "seed": 100 + i, "name": f"{i:03d}"} for i, text in enumerate(texts)]
    return [line | ({"negative_prompt": NEGATIVE} if i % 2 else {}) for i, line in enumerate(lines)]


def render_ldm(lines: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Work:
    return _into_folders(lines, lambda folder: render(lines, folder, **settings))


def render_diffusers(
    peer_arguments: tuple[str, ...], lines: Sequence[dict[str, Any]], call: dict[str, Any], size: int
) -> Work:
    """The usual loop: one call for every `size` lines, then their images are saved."""
    pipe = peer(*peer_arguments)

    def draw(folder: Path) -> None:
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

    return _into_folders(lines, draw)


def _into_folders(lines: Sequence[dict[str, Any]], draw: Callable[[Path], object]) -> Work:
    """Every call draws into a new folder; what is compared is the first one's images."""
    first = new_folder()
    paths = [first / f"{line['name']}.png" for line in lines]
    return Work(lambda: draw(new_folder()), lambda: pixels(lambda: draw(first), paths))
