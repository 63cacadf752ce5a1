"""One image with the models in memory, by our pipeline and by diffusers', from the same folder and noise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm.bench.timing import Timing, alternate
from ldm.checkpoint import check_model
from ldm.device import dtype_name, pick_device, pick_dtype
from ldm.errors import ConfigError, ModelError, NumericsError, one_line
from ldm.pipeline.pipeline import Pipeline

PEERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
FLOW_PEERS = tuple(PEERS)  # StableDiffusionPipeline can use these with flow models, and not the next two
PEERS |= {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
MAX_DIFFERENCE = {"fp32": 2.0, "bf16": 255.0, "fp16": 255.0}  # levels of 255; in 16 bits it is only reported
PROMPT, SEED = "a cat on a red background", 7


def warm(
    repeats: int = 5,
    model: str = "default",
    steps: int = 25,
    sampler: str = "dpmpp_2m",
    guidance_scale: float = 4.0,
    dtype: str = "fp32",
    device: str = "cpu",
    profile: bool = False,
) -> Timing:
    """Time our pipeline and diffusers' in alternation; folder, noise, sampler, steps, dtype and threads are equal.

    Both write PNGs. Raises ConfigError for a sampler that diffusers does not have, ModelError where `model` is no
    folder, and NumericsError where the two images in fp32 differ by more than 2 levels of 255.
    """
    require_peer(sampler)
    device, dtype = resolve_device(device, dtype)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    with tempfile.TemporaryDirectory() as folder:
        files = {"ldm": Path(folder) / "ours.png", "diffusers": Path(folder) / "theirs.png"}
        pipe = Pipeline(PROMPT, model=model, dtype=dtype, device=device)

        def draw_ldm() -> None:
            pipe.generate(seed=SEED, sampler=sampler, **settings).save(files["ldm"])

        draw_diffusers = _diffusers_call(files["diffusers"], model, dtype, device, sampler, settings)
        draw_ldm(), draw_diffusers()
        ldm_pixels, diffusers_pixels = (np.asarray(Image.open(path)).astype(float) for path in files.values())
        difference = np.abs(ldm_pixels - diffusers_pixels)
        if difference.max() > MAX_DIFFERENCE[dtype]:
            raise NumericsError(f"the images differ by {difference.max():.0f} of 255", where=f"{sampler}, {dtype}")
        seconds = alternate({"ldm": draw_ldm, "diffusers": draw_diffusers}, repeats)
        if profile:
            print(_profile(draw_ldm, device))
    agreement = {
        "largest difference of 255": float(difference.max()),
        "mean difference of 255": float(difference.mean()),
    }
    report_settings = {"model": model, "sampler": sampler, **settings, "dtype": dtype, "device": device}
    return Timing("warm", seconds, {**report_settings, "threads": torch.get_num_threads()}, agreement)


def require_peer(sampler: str) -> None:
    """Raise ConfigError for a sampler that diffusers does not have."""
    if sampler not in PEERS:
        raise ConfigError(f"diffusers has no equal of {sampler!r}", where="sampler", hint=f"one of {', '.join(PEERS)}")


def resolve_device(device: str, dtype: str) -> tuple[str, str]:
    """The names of the device and the dtype, `auto` resolved once for both sides. Raises ConfigError."""
    torch_device = pick_device(device)
    return str(torch_device), dtype_name(pick_dtype(dtype, torch_device))


def _diffusers_call(
    path: Path, model: str, dtype: str, device: str, sampler: str, settings: dict[str, Any]
) -> Callable:
    pipe = peer(model, dtype, device, sampler)

    def draw() -> None:
        generator = torch.Generator("cpu").manual_seed(SEED)
        pipe(PROMPT, generator=generator, **settings).images[0].save(path)

    return draw


def peer(model: str, dtype: str, device: str, sampler: str) -> Any:
    """diffusers' pipeline of a model's folder, with its own version of our sampler.

    Raises ModelError if it cannot read the folder, ConfigError if its sampler does not go with the model.
    """
    import diffusers

    folder = check_model(model)
    try:
        kind = pick_dtype(dtype, torch.device(device))
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=kind, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"diffusers cannot read it ({one_line(str(error))[:120]})", where=model) from None
    if pipe.scheduler.config.get("use_flow_sigmas") and sampler not in FLOW_PEERS:
        hint = f"one of {', '.join(FLOW_PEERS)}"
        raise ConfigError(f"diffusers' {PEERS[sampler]} does not work with flow models", where="sampler", hint=hint)
    pipe.to(device).set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, PEERS[sampler]).from_config(pipe.scheduler.config)
    return pipe


def _profile(call: Callable, device: str) -> str:
    """The operators that take longest on the device, as a table of torch's profiler."""
    with torch.profiler.profile() as profile:
        call()
    by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return profile.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40)
