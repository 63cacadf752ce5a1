"""One image with the models in memory, by our pipeline and by diffusers', from the same folder and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.bench.networks import with_compiled
from ldm.bench.timing import OURS, PEER, Row, Side, Work, new_folder
from ldm.checkpoint import check_model
from ldm.checkpoint.describe import describe
from ldm.device import check_unet_backend, dtype_name, pick_device, pick_dtype
from ldm.errors import ConfigError, ModelError, one_line
from ldm.pipeline.checks import check_int
from ldm.pipeline.pipeline import Pipeline

PEERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
FLOW_PEERS = tuple(PEERS)  # StableDiffusionPipeline can use these with flow models, and not the next two
PEERS |= {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
MAX_DIFFERENCE = {"fp32": 2.0, "bf16": 255.0, "fp16": 255.0}  # levels of 255; in 16 bits it is only reported
PROMPT, SEED = "a cat on a red background", 7


def warm_row(
    model: str = "default",
    steps: int = 25,
    sampler: str = "dpmpp_2m",
    guidance_scale: float = 4.0,
    dtype: str = "fp32",
    device: str = "cpu",
    compile: bool = False,
    backend: str = "torch",
    quick: bool = False,
) -> Row:
    """An image by our pipeline and diffusers'; folder, noise, sampler, steps, dtype and threads are equal.

    Both write PNGs; `compile`, `backend`: ours with a U-Net's code of torch.compile or of OpenVINO. Raises ConfigError
    for a sampler that diffusers does not have, ModelError for the model.
    """
    device, dtype, needs = placed(model, sampler, device, dtype)
    call = {"num_inference_steps": check_steps(steps), "guidance_scale": guidance_scale}
    given = (PROMPT, model, dtype, device, sampler, call)
    check_unet_backend(backend, torch.device(device))
    words = {"compile": compile, "backend": backend}
    sides = {OURS: Side(draw_ldm, (*given, words), needs), PEER: Side(draw_diffusers, (*given, False), needs)}
    settings = {"model": model, "sampler": sampler, **call, "dtype": dtype, "device": device}
    settings |= {word: value for word, value in words.items() if value not in (False, "torch")}
    settings["threads"] = torch.get_num_threads()
    limit, again = MAX_DIFFERENCE[dtype], 0 if quick else 1
    row = Row("warm", "an image, models in memory", sides, settings, limit, device=device, warmup=again)
    return with_compiled(row, Side(draw_diffusers, (*given, True), needs), quick)


def check_steps(steps: object) -> int:
    """Raise ConfigError unless this is one number of steps."""
    return check_int(steps, "num_inference_steps", 1, 1000)


def placed(model: str, sampler: str, device: str, dtype: str) -> tuple[str, str, float]:
    """The names of the device and the dtype, `auto` resolved once for all sides, and the bytes of the model.

    Raises ConfigError for a sampler that diffusers does not have at all or for the model, ModelError for the model.
    """
    if sampler not in PEERS:
        raise ConfigError(f"diffusers has no equal of {sampler!r}", where="sampler", hint=f"one of {', '.join(PEERS)}")
    torch_device = pick_device(device)
    kind = pick_dtype(dtype, torch_device)
    folder = check_model(model)
    if describe(model).schedule.is_flow and sampler not in FLOW_PEERS:
        hint = f"one of {', '.join(FLOW_PEERS)}"
        raise ConfigError(f"diffusers' {PEERS[sampler]} does not work with flow models", where="sampler", hint=hint)
    files = [folder] if folder is None or folder.is_file() else folder.rglob("*.safetensors")
    size = sum(path.stat().st_size for path in files if path is not None)
    return str(torch_device), dtype_name(kind), size * (3 if dtype == "fp32" else 2)  # files have 16 bits mostly


def draw_ldm(
    prompt: str, model: str, dtype: str, device: str, sampler: str, call: dict[str, Any], words: dict[str, Any]
) -> Work:
    pipe = Pipeline(prompt, model=model, dtype=dtype, device=device, **words)
    path = new_folder() / "image.png"

    def draw() -> None:
        pipe.generate(seed=SEED, sampler=sampler, **call).save(path)

    return Work(draw, lambda: pixels(draw, [path]))


def draw_diffusers(
    prompt: str, model: str, dtype: str, device: str, sampler: str, call: dict[str, Any], compiled: bool
) -> Work:
    pipe, path = peer(model, dtype, device, sampler), new_folder() / "image.png"
    if compiled:
        pipe.unet = torch.compile(pipe.unet)

    def draw() -> None:
        pipe(prompt, generator=torch.Generator("cpu").manual_seed(SEED), **call).images[0].save(path)

    return Work(draw, lambda: pixels(draw, [path]))


def pixels(draw: Any, paths: list[Path]) -> Tensor:
    """Call `draw`, and read the images that it has written: (N, H, W, 3) in levels of 255."""
    draw()
    return torch.from_numpy(np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) for path in paths]))


def peer(model: str, dtype: str, device: str, sampler: str) -> Any:
    """diffusers' pipeline of a model's folder, with its own version of our sampler. Raises ModelError."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):  # no bars and no notes between the results
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    folder = check_model(model)
    try:
        kind = pick_dtype(dtype, torch.device(device))
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=kind, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"diffusers cannot read it ({one_line(str(error))[:120]})", where=model) from None
    pipe.to(device).set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, PEERS[sampler]).from_config(pipe.scheduler.config)
    return pipe
