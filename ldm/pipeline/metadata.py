"""How a picture was made: one record a picture, and the text that A1111 and its relatives read."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

import ldm
from ldm.pipeline.request import Settings

if TYPE_CHECKING:
    from ldm.checkpoint.describe import ModelInfo
    from ldm.pipeline.adapters import Adapter
    from ldm.pipeline.drawing import ImageRequest
    from ldm.pipeline.placement import Placement

# Our spacings under the schedule names of A1111 that give the same timesteps, where the names are not the same.
SCHEDULE_TYPES = {"leading": "DDIM", "linspace": "Uniform", "trailing": "Simple"}
SAME_TYPES = ("simple", "karras", "exponential", "beta", "sgm_uniform", "ays")
PACKAGES = ("torch", "diffusers", "transformers")


def make_records(model: Any, work: Placement, settings: Settings, pictures: Sequence[ImageRequest]) -> list[dict]:
    """One record a picture: every resolved argument, the model and the machine."""
    shared = _shared(model, work, settings)
    reports: dict[tuple, dict] = {}
    for texts, adapters in dict.fromkeys((picture.texts, picture.adapters) for picture in pictures):
        reports[texts, adapters] = _text_report(model.text, texts, settings.runs[0].steps, _words_of(adapters))
    return [
        {
            "prompt": picture.prompt,
            "negative_prompt": picture.negative_prompt,
            "seed": picture.seed,
            "guidance_scale": picture.guidance_scale,
            **shared,
            "latents": "given" if picture.latents is not None else None,
            **_own(picture),
            **reports[picture.texts, picture.adapters],
        }
        for picture in pictures
    ]


def _shared(model: Any, work: Placement, settings: Settings) -> dict[str, Any]:
    """What is equal for all pictures of a call."""
    import torch

    device = work.device
    explicit = settings.timesteps or settings.sigmas
    own_table = settings.sampler == "lcm" or model.schedule.is_flow or explicit  # no spacing that has a name
    return {
        **settings.keywords(),
        "spacing": settings.spacing or (None if own_table else model.schedule.spacing),
        "model": model.name,
        "model_hash": model.hash,
        "commit": model.info.get("commit"),  # of a model from the hub
        "schedule": model.schedule.to_diffusers(),
        "dtype": dtype_name(model.dtype),
        "attention": work.attention,
        "offload": work.offload,
        "device": str(device) if device.type != "cuda" else f"{device} {torch.cuda.get_device_name(device)}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": _versions(),
    }


def _own(picture: ImageRequest) -> dict[str, Any]:
    """What a picture begins at, where that is more than its seed's noise."""
    seed, strength = picture.variation or (None, None)
    varied = {} if seed is None else {"variation_seed": seed, "variation_strength": strength}
    return {**varied, **({} if picture.source is None else picture.source.told)}


def too_large(info: ModelInfo, settings: Settings) -> str | None:
    """A line about a size of more pixels than the model was trained on; hires-fix begins small for that reason."""
    side = (info.unet.sample_size or 0) * info.factor
    if not side or settings.height * settings.width <= side**2:
        return None
    size = f"{settings.width}x{settings.height}"
    todo = "; try hires_scale" if settings.strength is None else ""
    return f"{size} is more than the {side}x{side} that the model was trained on: it may repeat itself{todo}"


def _words_of(adapters: Sequence[Adapter]) -> frozenset[str]:
    """The words that LoRAs were trained on, as far as they tell."""
    from ldm.checkpoint.lora import read_lora_header

    return frozenset(word for adapter in adapters for word in read_lora_header(adapter.path).words)


def _text_report(
    encoder: Any, texts: Sequence[str | None], steps: int, known: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """What the model does not see of the texts: what is cut off, words it was never shown, brackets left open."""
    from ldm.nn.text import cut_off
    from ldm.pipeline.encode import text_at_steps
    from ldm.prompts import BREAK, check, parse

    said = list(dict.fromkeys(own for text in texts if text for _, own in text_at_steps(text, steps)))
    plain = [" ".join(piece.text for piece in parse(text) if piece is not BREAK) for text in said]
    cut = [cut_off(encoder, text) for text in plain]
    words = [word for text in plain for word in encoder.unknown_words(text) if word not in known]
    return {
        "truncated": " … ".join(part for part in cut if part),
        "unknown_words": list(dict.fromkeys(words)),
        "remarks": [line for text in texts if text for line in check(text)],
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


def dtype_name(dtype: Any) -> str:
    """fp32, fp16 or bf16."""
    from ldm.device import DTYPES

    names = {f"torch.{full}": short for short, full in DTYPES.items()}
    return names.get(str(dtype), str(dtype))


def warnings_of(records: Sequence[dict], shown: int = 5) -> list[str]:
    """One line for each prompt of which something is not seen by the model; only the first few in full."""
    lines = []
    for record in records:
        if record["truncated"]:
            lines.append(f"the prompt is too long; not seen by the model: {_short(record['truncated'])}")
        lines += record["remarks"]
        if record["unknown_words"]:
            lines.append(f"words that the model was never shown: {_short(', '.join(record['unknown_words']))}")
    lines = list(dict.fromkeys(lines))
    more = len(lines) - shown
    return lines[:shown] + ([f"{more} more prompts are cut or hold unknown words; see .metadata"] if more > 0 else [])


def _short(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def parameters(record: dict) -> str:
    """A1111's text: the prompt, a line with the negative prompt where there is one, and the line of settings."""
    from ldm.diffusion.names import SAMPLER_NAMES, SPACING_NAMES

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
