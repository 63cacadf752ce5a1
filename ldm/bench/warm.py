"""One picture from models in memory to a file, by our pipeline and by diffusers', from the same folder and noise."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ldm.bench.timing import Timing, alternate
from ldm.errors import ConfigError, ModelError, NumericsError, one_line

PEERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "unipc": "UniPCMultistepScheduler"}
FLOW_PEERS = tuple(PEERS)  # StableDiffusionPipeline can use these with flow models, and not the next two
PEERS |= {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
APART = {"fp32": 2.0, "bf16": 255.0, "fp16": 255.0}  # levels of 255; in 16 bits the way is another, so it is reported
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
    """Time our pipeline and diffusers' by turns: same folder, noise, sampler, steps, dtype, threads; both write PNGs.

    Raises ConfigError for a sampler that diffusers has no equal of, ModelError where `model` is no folder, and
    NumericsError where the two pictures in fp32 are more than 2 levels of 255 apart: then there is nothing to time.
    """
    import numpy as np
    import torch
    from PIL import Image

    require_peer(sampler)
    device, dtype = settled(device, dtype)
    settings = {"num_inference_steps": steps, "guidance_scale": guidance_scale}
    with tempfile.TemporaryDirectory() as folder:
        files = {"ldm": Path(folder) / "ours.png", "diffusers": Path(folder) / "theirs.png"}
        ours = _ours(files["ldm"], model, dtype, device, sampler, settings)
        theirs = _theirs(files["diffusers"], model, dtype, device, sampler, settings)
        ours(), theirs()
        one, other = (np.asarray(Image.open(path)).astype(float) for path in files.values())
        apart = np.abs(one - other)
        if apart.max() > APART[dtype]:
            raise NumericsError(f"the pictures differ by {apart.max():.0f} of 255", where=f"{sampler}, {dtype}")
        seconds = alternate({"ldm": ours, "diffusers": theirs}, repeats)
        if profile:
            print(_profile(ours, device))
    agreement = {"largest difference of 255": float(apart.max()), "mean difference of 255": float(apart.mean())}
    told = {"model": model, "sampler": sampler, **settings, "dtype": dtype, "device": device}
    return Timing("warm", seconds, {**told, "threads": torch.get_num_threads()}, agreement)


def require_peer(sampler: str) -> None:
    """Raise ConfigError for a sampler that diffusers has no equal of."""
    if sampler not in PEERS:
        raise ConfigError(f"no equal of {sampler!r} in diffusers", where="sampler", todo=f"one of {', '.join(PEERS)}")


def settled(device: str, dtype: str) -> tuple[str, str]:
    """Names of the device and the dtype that these stand for here, `auto` once for both sides. Raises ConfigError."""
    from ldm.device import pick_device, pick_dtype
    from ldm.pipeline.metadata import dtype_name

    place = pick_device(device)
    return str(place), dtype_name(pick_dtype(dtype, place))


def _ours(path: Path, model: str, dtype: str, device: str, sampler: str, settings: dict[str, Any]) -> Callable:
    from ldm.pipeline import Pipeline

    pipe = Pipeline(PROMPT, model=model, dtype=dtype, device=device)
    return lambda: pipe.generate(seed=SEED, sampler=sampler, **settings).save(path)


def _theirs(path: Path, model: str, dtype: str, device: str, sampler: str, settings: dict[str, Any]) -> Callable:
    import torch

    pipe = peer(model, dtype, device, sampler)

    def draw() -> None:
        generator = torch.Generator("cpu").manual_seed(SEED)
        pipe(PROMPT, generator=generator, **settings).images[0].save(path)

    return draw


def peer(model: str, dtype: str, device: str, sampler: str) -> Any:
    """diffusers' pipeline of a model's folder, with its own of our samplers.

    Raises ModelError if it cannot read the folder, ConfigError if its sampler does not go with the model.
    """
    import diffusers
    import torch

    from ldm.checkpoint import check_model
    from ldm.device import pick_dtype

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
    """The operators that take longest where the networks work, as torch's profiler tells them."""
    import torch

    with torch.profiler.profile() as found:
        call()
    by = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    return found.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=40)
