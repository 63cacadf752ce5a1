"""A `parameters` text in our settings, as A1111, Forge, ComfyUI's save nodes and stable-diffusion.cpp mean it.

A field that cannot be repeated becomes a note, one line. A field that we have, with a value that we cannot take, is an
error, unless a change is given in its place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.diffusion.inpaint import steps_before
from ldm.diffusion.schedule import Schedule
from ldm.diffusion.schedule_types import is_same
from ldm.diffusion.spacings import DISTILLED
from ldm.errors import ConfigError
from ldm.pipeline.keywords import MAX_STEPS, UNSUPPORTED
from ldm.render.prompts.line_settings import WORDS, parse_settings
from ldm.render.prompts.setting_table import SETTINGS
from ldm.render.replay.a1111_text import Infotext
from ldm.render.replay.overrides import Changes

SHOWN = 120  # characters of a value in a note

# Fields of the text that we have settings for: field -> word of prompt lines.
WORDS_OF_FIELDS = {
    "Steps": "steps",
    "Sampler": "sampler",
    "Schedule type": "spacing",
    "Scheduler": "spacing",
    "CFG scale": "cfg_scale",
    "Seed": "seed",
    "Size": "size",
    "Clip skip": "clip_skip",
    "Eta": "eta",
    "Eta DDIM": "eta",
    "Denoising strength": "strength",
    "Hires upscale": "hires_scale",
    "Hires steps": "hires_steps",
    "Variation seed": "variation_seed",
    "Variation seed strength": "variation_strength",
}
IGNORED = ("Version", "User", "Created Date", "Batch size", "Batch pos", "Hashes", "Civitai resources")
IGNORED += ("Civitai metadata", "Model", "Model hash", "Lora hashes", "RNG", "Sampler RNG")
HINTS = dict.fromkeys(("VAE", "VAE hash"), "give --vae")
HINTS["Hires upscaler"] = "the image is enlarged by Lanczos here"
HINTS["Hires resize"] = "--set hires_scale=FACTOR"
NEUTRAL = {  # fields that some programs write always: what changes nothing
    "ENSD": ("0",),
    "Emphasis": ("Original", "No norm"),  # the second: see a1111_settings
    "Face restoration": ("None",),
    "Hires upscaler": ("Lanczos",),
    "Guidance": ("3.500000",),  # stable-diffusion.cpp: of distilled models
    "Tiling": ("False",),
}
# What A1111 takes for "Automatic", the sampler's own choice. A text without one means the sampler's plain levels:
# older versions joined the name to the sampler's, newer ones write the choice.
AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2s_ancestral": "karras", "dpm2": "karras"}
AUTOMATIC |= {"dpmpp_2m_sde": "exponential", "dpmpp_3m_sde": "exponential"}
PLAIN = {"ddim": "leading", "unipc": "leading", "lcm": None, "tcd": None, "ddpm": None}  # of others: linspace
SPACINGS = {"ddim": "leading", "ddim_uniform": "leading", "discrete": "linspace"}  # of A1111, ComfyUI, sd.cpp
NEARLY = {"leading": "DDIM", "linspace": "Uniform", "ays": "Align Your Steps"}  # ours -> theirs, not always the same
_NETWORK = re.compile(
    r"\s*<(?!lora:|lyco:)(\w+):[^<>]*>\s*", re.IGNORECASE
)  # A1111's other extra networks: <hypernet:name:1>


def a1111_settings(text: Infotext, base: Path, changes: Changes) -> tuple[dict, list[str], dict]:
    """(settings, notes, source) of a `parameters` text; `source` is what it says of model and LoRAs."""
    fields, notes = dict(text.fields), []
    for name, value in text.fields:
        if name in WORDS_OF_FIELDS and fields[name] != value:
            notes.append(not_repeated(name, value, f"given twice; {fields[name]!r:.40} is taken"))
    prompt = text.prompt
    if "prompt" not in changes.names:
        notes += [not_repeated("prompt", match[0].strip()) for match in _NETWORK.finditer(prompt)]
        prompt = _NETWORK.sub(" ", prompt).strip()
    settings = parse_settings([("prompt", prompt)], base) if prompt or fields else {}
    settings |= parse_settings([("negative_prompt", text.negative_prompt)], base)
    for name, value in fields.items():
        settings |= _of_field(name, value, fields, base, changes, notes)
    settings = {key: value for key, value in settings.items() if value is not None}  # Seed: -1
    if fields.get("Emphasis") == "No norm":
        settings["emphasis"] = "no_norm"
    if "variation_strength" not in settings:
        settings.pop("variation_seed", None)
    settings = _with_spacing(settings, fields, changes)
    settings = _with_hires_steps(settings, fields, changes, notes)
    notes += [not_repeated("text", piece) for piece in text.rest]
    notes += _notes_on_noise(fields) + _notes_on_gaps(settings, changes)
    keys = {"model": "Model", "model_hash": "Model hash", "lora": "Lora hashes"}
    source = {name: fields[key] for name, key in keys.items() if fields.get(key)}
    return settings, notes, {"program": fields.get("Version", "A1111"), **source}


def _of_field(
    name: str, value: str, fields: Mapping[str, str], base: Path, changes: Changes, notes: list[str]
) -> dict[str, Any]:
    """The settings of one field; what is not repeated is added to `notes`. Raises ConfigError for a bad value."""
    word = WORDS_OF_FIELDS.get(name)
    if word is None:
        if name not in IGNORED and value not in NEUTRAL.get(name, ()):
            notes.append(not_repeated(name, value, HINTS.get(name, "")))
        return {}
    setting = WORDS[word]
    if not set(SETTINGS[setting].sets or (setting,)) - changes.names:
        return {}
    if word == "strength":
        return _strength(name, value, fields, base, changes, notes)
    if word == "hires_steps" and (value.strip() == "0" or "Hires upscale" not in fields):  # see _with_hires_steps
        return {}
    if word == "spacing" and value.strip().lower() == "automatic":
        return {}
    if word == "eta" and _is_plain_eta(value, fields):
        return {}
    try:
        return parse_settings([(word, _plain(word, value))], base)
    except ConfigError as error:
        if setting in changes.names:
            return {}
        if setting in UNSUPPORTED:
            notes.append(not_repeated(name, value, error.what))
            return {}
        hint = f"--set {word}=VALUE" + (f"; {error.hint}" if error.hint else "")
        raise ConfigError(error.what, where=name, hint=hint) from None


def _plain(word: str, value: str) -> str | None:
    """A field's value as prompt lines have it; None for one that means nothing."""
    if word == "sampler":
        plain = re.sub(r"_gpu(?=[_ ]|$)", "", value)  # ComfyUI: dpmpp_2m_sde_gpu_karras
        return re.sub(r"[_ ](discrete|ddim_uniform)$", lambda end: f" {SPACINGS[end[1]]}", plain)
    if word == "spacing":
        return SPACINGS.get(value.strip().lower().replace(" ", "_"), value)
    if word == "clip_skip" and value.strip() in ("0", "-1"):  # stable-diffusion.cpp, ComfyUI: none is skipped
        return None
    return value


def _is_plain_eta(value: str, fields: Mapping[str, str]) -> bool:
    """stable-diffusion.cpp writes one always: 0, which it has meant for DDIM alone, or infinite, the sampler's own."""
    number = _float(value, 0.5)
    ddim = fields.get("Sampler", "").lower().startswith("ddim")
    return fields.get("Version", "").startswith("stable-diffusion.cpp") and (
        not math.isfinite(number) or (number == 0 and not ddim)
    )


def _float(text: str, default: float) -> float:
    try:
        return float(text)
    except ValueError:
        return default


def _strength(
    name: str, value: str, fields: Mapping[str, str], base: Path, changes: Changes, notes: list[str]
) -> dict[str, Any]:
    """Denoising strength: of hires-fix where there are Hires fields, else of an init image, which is unknown."""
    if "Hires upscale" in fields and "hires_scale" not in changes.names:
        return parse_settings([("hires_strength", value)], base)
    hires = any(key.startswith("Hires") for key in fields)
    if not hires and _float(value, 0.0) == 1:
        return {}
    if not hires and "image" in changes.settings:
        return parse_settings([("strength", value)], base)
    why = "of the second pass" if hires else "the image that it began with is not in the file; --set image=FILE"
    notes.append(not_repeated(name, value, why))
    return {}


def automatic_spacing(sampler: str) -> str | None:
    """What A1111 takes for "Automatic"; None where the sampler's own timesteps are meant."""
    return AUTOMATIC.get(sampler) or PLAIN.get(sampler, "linspace")


def _with_spacing(settings: dict[str, Any], fields: Mapping[str, str], changes: Changes) -> dict[str, Any]:
    """`settings` with the spacing that a text means by not naming one."""
    sampler = {**settings, **changes.settings}.get("sampler")
    named = "spacing" in settings or "spacing" in changes.names
    if named or sampler is None or fields.get("Version", "").startswith("ldm"):
        return settings
    schedule = fields.get("Schedule type", fields.get("Scheduler", ""))
    spacing = automatic_spacing(sampler) if schedule else PLAIN.get(sampler, "linspace")
    return settings if spacing is None else {**settings, "spacing": spacing}


def _with_hires_steps(
    settings: dict[str, Any], fields: Mapping[str, str], changes: Changes, notes: list[str]
) -> dict[str, Any]:
    """`settings` with the steps of the second run as we count them.

    A1111's "Hires steps" are all run, at the end of a longer schedule (setup_img2img_steps); without them, or with 0,
    as many as "Steps". Ours are those of the schedule, of which hires_strength is run.
    """
    if "Hires upscale" not in fields or "hires_steps" in changes.names:
        return settings
    kept = {name: value for name, value in settings.items() if name != "hires_steps"}
    ours = fields.get("Version", "").startswith("ldm") and "Hires steps" not in fields  # of 0.1: as many as before
    if ours or {"timesteps", "sigmas"} & changes.names:
        return kept
    known = {**settings, **changes.settings}
    ran, strength = settings.get("hires_steps") or known.get("num_inference_steps"), known.get("hires_strength")
    if not ran or not strength:
        why = "how much of them is run is not given; --set hires_strength=X"
        notes += [not_repeated("Hires steps", settings["hires_steps"], why)] if "hires_steps" in settings else []
        return kept
    steps = steps_before(ran, strength)
    if steps > MAX_STEPS:
        what = f"{ran} steps at a strength of {strength:g} are the end of {steps:,}, and {MAX_STEPS} are the most"
        raise ConfigError(what, where="Hires steps", hint="--set hires_steps=N")
    return {**kept, "hires_steps": steps}


def fit_spacing(settings: Mapping[str, Any], program: str, schedule: Schedule) -> tuple[dict[str, Any], list[str]]:
    """(settings, notes) of a text for a model with this schedule: what its spacing cannot be, or is not quite.

    A1111's texts mean a spacing even where they name none, which a flow model refuses.
    """
    spacing, sampler, steps = (settings.get(name) for name in ("spacing", "sampler", "num_inference_steps"))
    if spacing is not None and schedule.is_flow:
        kept = {name: value for name, value in settings.items() if name != "spacing"}
        return kept, [not_repeated("spacing", spacing, "a flow model has its own")]
    notes = []
    if program.startswith("ldm"):
        unnamed = spacing is None and not schedule.is_flow and sampler is not None and sampler not in DISTILLED
        notes += ["not given: spacing, which A1111 had no name for (the model's own is taken)"] if unnamed else []
        return dict(settings), notes
    known = spacing in NEARLY and sampler is not None and steps is not None
    if known and not is_same(spacing, sampler, steps, schedule.num_train_timesteps, schedule.steps_offset):
        why = f"{spacing} has other timesteps here with {sampler} and {steps} steps"
        notes.append(not_repeated("Schedule type", NEARLY[spacing], why))
    return dict(settings), notes


def _notes_on_noise(fields: Mapping[str, str]) -> list[str]:
    """Where the first noise was not torch's on the CPU."""
    version = fields.get("Version", "")
    if "RNG" not in fields and version.lower().startswith(("ldm", "comfyui")):
        return []
    notes = []
    for name in ("RNG", "Sampler RNG"):
        if name in fields and fields[name].upper() != "CPU":
            notes.append(not_repeated(name, fields[name], "noise is drawn on the CPU here: the image will differ"))
    if "RNG" not in fields and fields:
        notes.append("not repeated: RNG is not given, so the noise was drawn on a GPU: the image will differ")
    return notes


def _notes_on_gaps(settings: Mapping[str, Any], changes: Changes) -> list[str]:
    """One line for the settings that are not in the text."""
    wanted = {"seed": "seed", "num_inference_steps": "steps", "guidance_scale": "guidance scale", "width": "size"}
    wanted |= {"sampler": "sampler"}
    gaps = [words for name, words in wanted.items() if name not in settings and name not in changes.names]
    return [f"not given: {', '.join(gaps)} (drawn, or the model's own)"] if gaps else []


def not_repeated(name: str, value: Any, why: str = "") -> str:
    """The note on one field."""
    text = " ".join(str(value).split())
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
    return f"not repeated: {name}: {text}" + (f" ({why})" if why else "")
