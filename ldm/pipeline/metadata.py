"""How an image was made: our own metadata of it, and the text that A1111 and its relatives read."""

from __future__ import annotations

import contextlib
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
from ldm.diffusion.inpaint import steps_left
from ldm.diffusion.names import SAMPLER_NAMES
from ldm.diffusion.schedule_types import schedule_type
from ldm.diffusion.spacings import DISTILLED
from ldm.nn.text import cut_off
from ldm.pipeline.encode import named_emoji
from ldm.prompts import Prompt

if TYPE_CHECKING:
    from ldm.checkpoint import Model
    from ldm.checkpoint.few_steps import Sampling
    from ldm.nn.text import TextEncoder
    from ldm.pipeline.adapters import Adapter
    from ldm.pipeline.placement import Placement
    from ldm.pipeline.request import ImageRequest, Settings

# A1111's fields in its order -> our keyword; None: computed in `parameters`
LABELS: dict[str, str | None] = {"Steps": "num_inference_steps", "Sampler": None, "Schedule type": None}
LABELS |= {"CFG scale": "guidance_scale", "Seed": "seed", "Size": None, "Model hash": None, "Model": "model"}
LABELS |= {"Denoising strength": None, "Clip skip": None, "Hires upscale": "hires_scale", "Hires steps": None}
LABELS |= {"Hires upscaler": None, "Variation seed": "variation_seed", "Variation seed strength": "variation_strength"}
LABELS |= dict.fromkeys(("Mask blur", "Lora hashes", "RNG", "Version"))
NOT_READ = "the negative prompt is not read: with this model it needs a true_cfg_scale above 1"
PACKAGES = ("torch", "diffusers", "transformers")


def make_metadata(
    model: Model,
    placement: Placement,
    settings: Settings,
    requests: Sequence[ImageRequest],
    few: Sampling | None = None,
) -> list[dict[str, Any]]:
    """The metadata of each image: every resolved argument, the model and the machine; `few`: of few-step models."""
    shared, found = _shared(model, placement, settings), []
    last = {} if few is None else {"few_steps": few.kind}
    for request, report in zip(requests, text_reports(model.text, settings, requests)):
        negative = None if request.negative_prompt is None else request.negative_prompt.text
        own: dict[str, Any] = {"prompt": request.prompt.text, "negative_prompt": negative, "seed": request.seed}
        own["guidance_scale"] = request.guidance_scale
        start = {"latents": None} if request.begins_at_noise else _start(request)
        found.append({**own, **shared, **start, **report, **last})
    return found


def _shared(model: Model, placement: Placement, settings: Settings) -> dict[str, Any]:
    """What is equal for all images of a call."""
    device = placement.device
    explicit = settings.timesteps or settings.sigmas
    own_table = settings.sampler in DISTILLED or model.schedule.is_flow or explicit  # no spacing that has a name
    return {
        **settings.keywords(),
        **({"inexact": f"deep features are reused: step_cache {settings.step_cache}"} if settings.step_cache else {}),
        "spacing": settings.spacing or (None if own_table else model.schedule.spacing),
        "model": model.name,
        "model_hash": model.hash,
        "commit": model.info.get("commit"),  # of a model from the hub
        "schedule": write_scheduler(model.schedule),
        "dtype": dtype_name(model.dtype),
        "attention": placement.attention,
        "offload": placement.offload,
        **({"compile": True} if placement.compile else {}),
        **({"backend": placement.backend} if placement.backend != "torch" else {}),
        "device": str(device) if device.type != "cuda" else f"{device} {torch.cuda.get_device_name(device)}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": _versions(placement.backend),
    }


def _start(request: ImageRequest) -> dict[str, Any]:
    """What an image begins at, where that is more than its seed's noise."""
    found: dict[str, Any] = {"latents": None if request.latents is None else "given"}
    if request.variation is not None:
        found |= dict(zip(("variation_seed", "variation_strength"), request.variation))
    if request.controls:
        found["control_image"] = [image.name for image in request.controls]
        found["control_sha256"] = [image.sha256 for image in request.controls]
    for word, kind in (("ip_adapter_image", "images"), ("ip_adapter_mask", "masks")):
        files = [getattr(one, kind) for one in request.shown]  # of each adapter
        if any(files):
            found[word] = [[file.name for file in one] for one in files]
            found[f"{word}_sha256"] = [[file.sha256 for file in one] for one in files]
    return found if request.source is None else {**found, **request.source.metadata}


def text_reports(encoder: TextEncoder, settings: Settings, requests: Sequence[ImageRequest]) -> list[dict[str, Any]]:
    """What the model does not see of each request's prompts: what is cut off, words it was never shown, remarks."""
    report = functools.cache(functools.partial(_text_report, encoder, settings.runs[0].steps))
    found = []
    for request in requests:
        one = dict(report(request.prompts, request.adapters))
        unread = request.true_cfg_scale is not None and request.cfg_scale <= 1 and request.negative_prompt
        found.append({**one, "remarks": [*one["remarks"], NOT_READ]} if unread and unread.text else one)
    return found


def _text_report(
    encoder: TextEncoder, steps: int, prompts: Sequence[Prompt | None], adapters: Sequence[Adapter]
) -> dict:
    trained = {word for adapter in adapters for word in read_lora_header(adapter.path).words}
    texts = [prompt for prompt in prompts if prompt is not None and prompt.text]
    read = list(dict.fromkeys(text for prompt in texts for _, text in prompt.at_steps(steps)))
    named: dict[str, str] = {}
    if not all(text.written.isascii() for text in read):
        pairs = [named_emoji(encoder, text, trained) for text in read]
        read, named = [text for text, _ in pairs], {emoji: name for _, names in pairs for emoji, name in names.items()}
    plain = [text.plain for text in read]
    cut = [cut_off(encoder, text) for text in plain]
    words = [word for text in plain for word in encoder.unknown_words(text) if word not in trained]
    remarks = [line for prompt in texts for line in prompt.remarks]
    shown = {"truncated": " … ".join(filter(None, cut)), "unknown_words": list(dict.fromkeys(words))}
    return {**shown, "remarks": remarks, **({"named": named} if named else {})}


@functools.cache
def _versions(backend: str) -> dict[str, str]:
    found = {"ldm": ldm.__version__, "python": platform.python_version()}
    for package in dict.fromkeys((*PACKAGES, backend)):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def warnings_of(reports: Sequence[dict], shown: int = 5) -> list[str]:
    """One line for each thing in metadata or reports that the model does not see of prompts; the first ones in full."""
    seen = [one for one in reports if one["truncated"] or one["remarks"] or one["unknown_words"]]
    lines = list(dict.fromkeys(line for report in seen for line in _lines_of(report)))
    more = len(lines) - shown
    return lines[:shown] + ([f"{more} more prompts are cut or hold unknown words; see .metadata"] if more > 0 else [])


def _lines_of(report: dict) -> list[str]:
    lines = list(report["remarks"])
    if report["truncated"]:
        lines.insert(0, f"the prompt is too long; not seen by the model: {_short(report['truncated'])}")
    if report["unknown_words"]:
        lines.append(f"words that the model was never shown: {_short(', '.join(report['unknown_words']))}")
    return lines


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def _tag(lora: dict[str, Any]) -> str:
    text = f"{lora['text_weight']:g}:" if "text_weight" in lora else ""
    return f"<lora:{lora['name']}:{text}{lora['weight']:g}>"


def parameters(record: dict) -> str:
    """A1111's text: the prompt, a line with the negative prompt where there is one, and the line of settings."""
    loras, hires = record.get("lora", ()), record.get("hires_scale")
    prompt = " ".join([record["prompt"], *map(_tag, loras)])
    computed = {
        "Sampler": SAMPLER_NAMES[record["sampler"]][0],
        "Schedule type": _schedule_type(record),
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": (record["model_hash"] or "")[:10] or None,
        "Denoising strength": record.get("hires_strength") or record.get("strength"),
        "Clip skip": record["clip_skip"] + 1 if record.get("clip_skip") else None,  # 1 is A1111's for none skipped
        "Hires steps": _steps_of_second_run(record) if hires else None,
        "Hires upscaler": "Lanczos" if hires else None,
        "Mask blur": 0 if record.get("mask_sha256") or record.get("outpaint") else None,
        "Lora hashes": ", ".join(f"{lora['name']}: {lora['short_hash']}" for lora in loras) or None,
        "RNG": "CPU",
        "Version": f"ldm {record['versions']['ldm']}",
    }
    fields = {label: computed[label] if word is None else record.get(word) for label, word in LABELS.items()}
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {record['negative_prompt']}" if record["negative_prompt"] else ""
    return f"{prompt}{negative}\n{line}"


def _schedule_type(record: dict) -> str | None:
    """A1111's schedule type that gives the same steps; None where none does, as with flow models."""
    if record["spacing"] is None:
        return None
    schedule = record.get("schedule") or {}
    total, offset = schedule.get("num_train_timesteps", 1000), schedule.get("steps_offset", 0)
    return schedule_type(record["spacing"], record["sampler"], record["num_inference_steps"], total, offset)


def _steps_of_second_run(record: dict) -> int:
    """As A1111 counts: those that are run. Ours are those of which hires_strength is run."""
    return steps_left(record.get("hires_steps") or record["num_inference_steps"], record["hires_strength"])


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",\n:") else text
