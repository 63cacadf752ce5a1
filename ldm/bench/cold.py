"""From a cold start to an image on disk, against a script over diffusers, and importing what every such tool needs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ldm.bench.timing import OURS, PEER, Row, Side, Work, new_folder
from ldm.bench.warm import MAX_DIFFERENCE, pixels
from ldm.checkpoint import check_model
from ldm.errors import LdmError

IMPORTS = "import torch; from diffusers import AutoencoderKL; from transformers import CLIPTextModel"
SCRIPT = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
folder, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
noise = torch.Generator("cpu").manual_seed(1)
pipe("a cat", generator=noise, num_inference_steps=25, guidance_scale=4.0).images[0].save(out)
"""
SETTINGS = "--seed 1 --sampler dpmpp_2m --steps 25 --guidance-scale 4 --dtype fp32 --device cpu"


def cold_row(model: str = "default", quick: bool = False) -> Row:
    """`ldm generate "a cat"` in a new process, and the same image by diffusers. Raises ModelError for the model.

    With `quick` the images that are compared are those that are timed.
    """
    draw = [sys.executable, "-m", "ldm", "generate", "a cat", *SETTINGS.split(), "--model", model, "-q", "-o"]
    script = [sys.executable, "-c", SCRIPT, str(check_model(model))]
    sides = {OURS: Side(drawn_by, (draw,)), PEER: Side(drawn_by, (script,))}
    sides["imports alone"] = Side(imported, ([sys.executable, "-c", IMPORTS],))
    settings = {"model": model, "imports": IMPORTS}
    return Row("cold", "an image from a new process", sides, settings, MAX_DIFFERENCE["fp32"], once=quick)


def drawn_by(command: list[str]) -> Work:
    """A command, whose last word is to be the image's path."""
    path = new_folder() / "a-cat.png"
    return Work(lambda: _run([*command, str(path)]), lambda: pixels(lambda: _run([*command, str(path)]), [path]), True)


def imported(command: list[str]) -> Work:
    return Work(lambda: _run(command), lambda: _run(command), True)


def _run(command: list[str]) -> None:
    """Run a command. Raises LdmError with the last line of its errors."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["without a message"])[-1]
        raise LdmError(f"ended with {done.returncode} ({last_line})", where=" ".join(command[1:4]))
