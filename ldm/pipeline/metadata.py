"""How an image was made: our own metadata of it, and the text that A1111 and its relatives read."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import ldm
from ldm.checkpoint.lora import read_lora_header
from ldm.device import dtype_name
from ldm.diffusion.diffusers_config import write_scheduler
from ldm.diffusion.names import SAMPLER_NAMES, SPACING_NAMES
from ldm.nn.text import cut_off
from ldm.prompts import Prompt

if TYPE_CHECKING:
    from ldm.checkpoint import Model
    from ldm.checkpoint.describe import ModelInfo
    from ldm.nn.text import TextEncoder
    from ldm.pipeline.adapters import Adapter
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import ImageRequest, Settings

# Our spacings under the schedule names of A1111 that give the same timesteps, where the names are not the same.
SCHEDULE_TYPES = {"leading": "DDIM", "linspace": "Uniform", "trailing": "Simple"}
SAME_TYPES = ("simple", "karras", "exponential", "beta", "sgm_uniform", "ays")
PACKAGES = ("torch", "diffusers", "transformers")


def make_metadata(
    model: Model, placement: Placement, settings: Settings, requests: Sequence[ImageRequest]
) -> list[dict[str, Any]]:
    """The metadata of each image: every resolved argument, the model and the machine."""
    shared = _shared(model, placement, settings)
    reports = text_reports(model.text, settings, requests)
    return [
        {
            "prompt": request.prompt.text,
            "negative_prompt": None if request.negative_prompt is None else request.negative_prompt.text,
            "seed": request.seed,
            "guidance_scale": request.guidance_scale,
            **shared,
            "latents": "given" if request.latents is not None else None,
            **_start(request),
            **report,
        }
        for request, report in zip(requests, reports)
    ]


def _shared(model: Model, placement: Placement, settings: Settings) -> dict[str, Any]:
    """What is equal for all images of a call."""
    device = placement.device
    explicit = settings.timesteps or settings.sigmas
    own_table = settings.sampler == "lcm" or model.schedule.is_flow or explicit  # no spacing that has a name
    return {
        **settings.keywords(),
        "spacing": settings.spacing or (None if own_table else model.schedule.spacing),
        "model": model.name,
        "model_hash": model.hash,
        "commit": model.info.get("commit"),  # of a model from the hub
        "schedule": write_scheduler(model.schedule),
        "dtype": dtype_name(model.dtype),
        "attention": placement.attention,
        "offload": placement.offload,
        "device": str(device) if device.type != "cuda" else f"{device} {torch.cuda.get_device_name(device)}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": _versions(),
    }


def _start(request: ImageRequest) -> dict[str, Any]:
    """What an image begins at, where that is more than its seed's noise."""
    seed, strength = request.variation or (None, None)
    varied = {} if seed is None else {"variation_seed": seed, "variation_strength": strength}
    return {**varied, **({} if request.source is None else request.source.metadata)}


def too_large(info: ModelInfo, settings: Settings) -> str | None:
    """A line about a size of more pixels than the model was trained on; hires-fix begins small for that reason."""
    side = (info.unet.sample_size or 0) * info.factor
    if not side or settings.height * settings.width <= side**2:
        return None
    size = f"{settings.width}x{settings.height}"
    hint = "; try hires_scale" if settings.strength is None else ""
    return f"{size} is more than the {side}x{side} that the model was trained on: it may repeat itself{hint}"


def text_reports(encoder: TextEncoder, settings: Settings, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
    """What the model does not see of each request's prompts: what is cut off, words it was never shown, remarks."""
    known: dict[tuple, dict[str, Any]] = {}
    for request in requests:
        key = request.prompts, request.adapters
        if key not in known:
            known[key] = _text_report(encoder, *key, settings.runs[0].steps)
    return [known[request.prompts, request.adapters] for request in requests]


def _text_report(
    encoder: TextEncoder, prompts: Sequence[Prompt | None], adapters: Sequence[Adapter], steps: int
) -> dict[str, Any]:
    trained = {word for adapter in adapters for word in read_lora_header(adapter.path).words}
    texts = [prompt for prompt in prompts if prompt is not None and prompt.text]
    plain = [text.plain for text in dict.fromkeys(text for prompt in texts for _, text in prompt.at_steps(steps))]
    cut = [cut_off(encoder, text) for text in plain]
    words = [word for text in plain for word in encoder.unknown_words(text) if word not in trained]
    return {
        "truncated": " … ".join(part for part in cut if part),
        "unknown_words": list(dict.fromkeys(words)),
        "remarks": [line for prompt in texts for line in prompt.remarks],
    }


@functools.cache
def _versions() -> dict[str, str]:
    found = {"ldm": ldm.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def warnings_of(reports: Sequence[dict], shown: int = 5) -> list[str]:
    """One line for each thing in metadata or reports that the model does not see of prompts; the first ones in full."""
    lines = []
    for report in reports:
        if report["truncated"]:
            lines.append(f"the prompt is too long; not seen by the model: {_short(report['truncated'])}")
        lines += report["remarks"]
        if report["unknown_words"]:
            lines.append(f"words that the model was never shown: {_short(', '.join(report['unknown_words']))}")
    lines = list(dict.fromkeys(lines))
    more = len(lines) - shown
    return lines[:shown] + ([f"{more} more prompts are cut or hold unknown words; see .metadata"] if more > 0 else [])


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def parameters(record: dict) -> str:
    """A1111's text: the prompt, a line with the negative prompt where there is one, and the line of settings."""
    types = {**SCHEDULE_TYPES, **{name: SPACING_NAMES[name][0] for name in SAME_TYPES}}
    loras = record.get("lora", ())
    prompt = " ".join([record["prompt"], *(f"<lora:{lora['name']}:{lora['weight']:g}>" for lora in loras)])
    fields = {
        "Steps": record["num_inference_steps"],
        "Sampler": SAMPLER_NAMES[record["sampler"]][0],
        "Schedule type": types.get(record["spacing"]),
        "CFG scale": record["guidance_scale"],
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record["model_hash"][:10] if record["model_hash"] else None,
        "Model": record["model"],
        "Denoising strength": record.get("hires_strength") or record.get("strength"),
        "Clip skip": record["clip_skip"] + 1 if record.get("clip_skip") else None,  # 1 is A1111's for none skipped
        "Hires upscale": record.get("hires_scale"),
        "Hires steps": record.get("hires_steps"),
        "Hires upscaler": "Lanczos" if record.get("hires_scale") else None,
        "Variation seed": record.get("variation_seed"),
        "Variation seed strength": record.get("variation_strength"),
        "Mask blur": 0 if record.get("mask_sha256") or record.get("outpaint") else None,
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['short_hash']}" for lora in loras) or None,
        "RNG": "CPU",
        "Version": f"ldm {record['versions']['ldm']}",
    }
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {record['negative_prompt']}" if record["negative_prompt"] else ""
    return f"{prompt}{negative}\n{line}"


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
