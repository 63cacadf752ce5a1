"""The settings that other programs write into images as JSON: SwarmUI, Fooocus, InvokeAI, NovelAI and their like.

Fields are recognised by their names, whatever the program: `negativeprompt`, `negative_prompt` and `uc` are one. They
become the text that A1111 would have written, so that one module knows what a field means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ldm.errors import DataError
from ldm.render.replay.a1111_text import MAX_TEXT, Infotext

PROGRAMS = {  # a key of the JSON, or the name of the text that holds it -> the program that writes it
    "sui_image_params": "SwarmUI",
    "fooocus_scheme": "Fooocus",
    "metadata_scheme": "Fooocus",
    "invokeai_metadata": "InvokeAI",
    "Comment": "NovelAI",
}
GRAPHS = {"workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_graph": "InvokeAI", "invokeai_workflow": "InvokeAI"}
NAMES = {  # a key without case and punctuation -> A1111's field
    **dict.fromkeys(("prompt", "positiveprompt", "positive"), "prompt"),
    **dict.fromkeys(("negativeprompt", "negative", "uc", "uncond"), "negative_prompt"),
    **dict.fromkeys(("steps", "numinferencesteps", "numsteps", "samplingsteps"), "Steps"),
    **dict.fromkeys(("seed", "noiseseed"), "Seed"),
    **dict.fromkeys(("cfgscale", "cfg", "guidancescale", "scale"), "CFG scale"),
    **dict.fromkeys(("sampler", "samplername", "samplermethod"), "Sampler"),
    **dict.fromkeys(("scheduler", "schedule", "scheduletype"), "Schedule type"),
    **dict.fromkeys(("resolution", "size"), "Size"),
    **dict.fromkeys(("model", "basemodel", "modelname", "usestablediffusionmodel"), "Model"),
    **dict.fromkeys(("modelhash", "basemodelhash"), "Model hash"),
    "width": "width",
    "height": "height",
}
TELLING = frozenset({"seed", "Steps", "CFG scale", "Seed"})  # beside a prompt one of these makes settings of an object
OWN_SPACINGS = ("normal", "simple", "karras", "exponential", "sgm_uniform", "ddim_uniform", "beta", "automatic")
_JSON = re.compile(r'\s*[{\[]\s*["{\[]')


def is_json(text: str) -> bool:
    """Whether a text is JSON, or means to be: no prompt begins like that."""
    return _JSON.match(text) is not None


def read_foreign(texts: Mapping[str, str]) -> Infotext | None:
    """The settings in an image's texts (name -> text) as A1111's; None where no text is JSON with settings.

    Raises DataError for JSON that cannot be read, and names the program whose settings are a graph.
    """
    for name, text in texts.items():
        if not is_json(text):
            continue
        value = _decoded(name, text)
        found = next(_settings_in(value), None)
        if found is not None:
            outer = set(value) if isinstance(value, dict) else set()
            marks = {name, *outer, *texts}
            program = next((title for mark, title in PROGRAMS.items() if mark in marks), "")
            return _infotext(found, program)
        if name in GRAPHS or "class_type" in text:
            what = f"holds {GRAPHS.get(name, 'ComfyUI')}'s graph of nodes, which is not read"
            raise DataError(what, where=name, hint="give prompt and settings yourself")
        if name == "parameters":
            keys = ", ".join(map(str, list(value)[:5])) if isinstance(value, dict) else "a list"
            hint = "give prompt and settings yourself"
            raise DataError(f"holds JSON of another program without a prompt ({keys:.80})", where=name, hint=hint)
    return None


def _decoded(name: str, text: str) -> Any:
    if len(text) > MAX_TEXT:
        raise DataError(f"has {len(text):,} characters, more than {MAX_TEXT:,}", where=name)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError("holds JSON that is damaged", where=name, hint="give prompt and settings yourself") from None


def _settings_in(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The objects that hold a prompt and one of the telling settings, the outermost first."""
    if not isinstance(value, dict) or depth > 3:
        return
    fields = {field: item for key, item in value.items() if (field := NAMES.get(_plain(key)))}
    if isinstance(fields.get("prompt"), str) and (TELLING & fields.keys()):
        yield value
        return
    for item in value.values():
        yield from _settings_in(item, depth + 1)


def _plain(key: str) -> str:
    return re.sub(r"[\W_]+", "", key.lower())


def _infotext(settings: Mapping[str, Any], program: str) -> Infotext:
    fields: dict[str, str] = {}
    rest = []
    for key, value in settings.items():
        field = NAMES.get(_plain(key))
        if field is None or (isinstance(value, (dict, list)) and field != "Size"):
            rest += [key] if value not in (None, "", [], {}, False) else []
        elif value is not None:
            fields.setdefault(field, _as_text(field, value))
    prompt, negative = fields.pop("prompt"), fields.pop("negative_prompt", "")
    width, height = fields.pop("width", None), fields.pop("height", None)
    if width and height:
        fields["Size"] = f"{width}x{height}"
    _part_scheduler(fields)
    fields["Version"] = program or "another program"
    if program == "SwarmUI":
        fields["RNG"] = "CPU"  # its backend is ComfyUI
    left = f"other fields ({', '.join(rest)})"
    return Infotext(prompt, negative, tuple(fields.items()), (left,) if rest else ())


def _as_text(field: str, value: Any) -> str:
    if field != "Size":
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    sides = re.findall(r"\d+", str(value))  # "(1152, 896)", "1152x896", [1152, 896]
    return "x".join(sides[:2]) if len(sides) >= 2 else str(value)


def _part_scheduler(fields: dict[str, str]) -> None:
    """InvokeAI calls its sampler the scheduler (dpmpp_2m_k); others mean the spacing."""
    scheduler = fields.get("Schedule type", "")
    if scheduler and "Sampler" not in fields and scheduler.lower() not in OWN_SPACINGS:
        fields["Sampler"] = re.sub("_k$", "_karras", fields.pop("Schedule type"))
