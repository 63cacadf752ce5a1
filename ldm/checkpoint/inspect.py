"""What a model, an autoencoder, a text encoder or a LoRA on disk is, told from settings and headers alone; no torch.

Of weights nothing is read but the alphas of a LoRA, single numbers that stand beside its matrices.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ldm.checkpoint import folder as layouts
from ldm.checkpoint import lora, single
from ldm.checkpoint.default import default_folder
from ldm.checkpoint.families import FAMILIES, Family, family_of
from ldm.checkpoint.lora.read import FILE as LORA_FILE
from ldm.checkpoint.lora.target import target_for
from ldm.checkpoint.safety import PICKLES, Header, Tensor, read_header, read_json, refuse_pickle
from ldm.checkpoint.single.header import KEY
from ldm.checkpoint.single.names import UNET
from ldm.checkpoint.tensors import weight_files
from ldm.errors import ModelError

SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
OWN_WIDTH = "settings of its own, those of no known family"
COMPONENTS = {  # class in a component's config.json -> (kind, the component's name)
    "AutoencoderKL": ("autoencoder", "vae"),
    "UNet2DConditionModel": ("U-Net", "unet"),
    "CLIPTextModel": ("text encoder", "text_encoder"),
    "CLIPTextModelWithProjection": ("text encoder", "text_encoder"),
    "T5EncoderModel": ("text encoder", "text_encoder"),
}
ENCODERS = {  # a part of a key -> what a file of such keys is
    "text_model.encoder.layers.": "a CLIP text encoder alone",
    "transformer.resblocks.": "an OpenCLIP text encoder alone",
    "SelfAttention.relative_attention_bias": "a T5 text encoder alone",
}
VERSIONS = {"sd_v1": "sd1", "sd_v2": "sd2", "sdxl": "xl"}  # beginnings of ss_base_model_version
WIDTHS = {768: "sd1", 1024: "sd2", 2048: "xl"}  # of the text that a U-Net attends to
SHOWN = 50  # keys that are listed


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """What is at `path`: a model's folder or file, one part of it, a training run, a LoRA, or "default".

    kind, format, family, prediction_type, dtypes, parameters and parts (where there are some), lora (rank, alpha), the
    header's metadata, and `unapplied`: keys that loading would refuse, each with the reason. What is sound and none of
    these has the kind "other" and says in `what` what it is. Raises ModelError: pickles, damaged and missing files.
    """
    place = default_folder() if str(path) == "default" else Path(path).expanduser()
    if not place.exists():
        raise ModelError("no such file or folder", where=place)
    found = _folder(place) if place.is_dir() else _file(place)
    return {"path": str(place), **found}


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / layouts.INDEX).is_file():
        return _model(layouts.read_layout(folder))
    if (folder / "config.json").is_file():
        return _component(folder)
    if (folder / "model").is_dir():
        return {**_folder(folder / "model"), "run": str(folder)}
    for part in ("vae", "text_encoder"):  # what a stage of training leaves
        if (folder / part / "config.json").is_file():
            return _component(folder / part)
    weights = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors")
    if (folder / LORA_FILE).is_file() or len(weights) == 1:
        return _file(folder / LORA_FILE if (folder / LORA_FILE).is_file() else weights[0])
    if weights:
        raise ModelError(f"holds {len(weights)} .safetensors files and no settings", where=folder, todo="name a file")
    if (folder / "checkpoints").is_dir():
        raise ModelError("is a run that has no model yet", where=folder, todo="go on with --resume")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in PICKLES:
            refuse_pickle(path)
    raise ModelError("holds no model, no part of one and no LoRA", where=folder)


def _model(layout: layouts.Layout) -> dict[str, Any]:
    """A whole model's folder."""
    tensors = {part: _tensors(layout, part) for part in layout.weights}
    parts = {part: _part(tensors[part].values(), layout.index[part][-1]) for part in tensors}
    named = [path.name for paths in layout.weights.values() for path in paths]
    variant = " (fp16 variant)" if any(".fp16." in name or ".fp16-" in name for name in named) else ""
    scheduler, unet = layout.configs["scheduler"], layout.configs["unet"]
    family = _family({name: tensor.shape for name, tensor in tensors["unet"].items()}, layout.folder)
    if layout.text_class("text_encoder") in layouts.T5:
        family = None
    card = layouts.card_settings(layouts.read_card(layout.folder) or "")
    return {
        "kind": "model",
        "format": f"{layout.index['_class_name']} folder{variant}",
        **_named(family),
        "prediction_type": "flow" if _flow(scheduler) else scheduler.get("prediction_type", "epsilon"),
        **_sizes(unet, layout.configs["vae"]),
        **_total(parts),
        "manifest": bool(layout.manifest),
        "metadata": {key: value for key, value in card.items() if isinstance(value, str | int | float | dict)},
        "unapplied": [],
    }


def _flow(scheduler: Mapping[str, Any]) -> bool:
    return bool(scheduler.get("use_flow_sigmas")) or scheduler.get("prediction_type") == "flow_prediction"


def _component(folder: Path) -> dict[str, Any]:
    """A folder with one component: its config.json and weights."""
    config = read_json(folder / "config.json")
    name = str(config.get("_class_name") or next(iter(config.get("architectures") or ()), ""))
    if name not in COMPONENTS:
        raise ModelError(f"is {name or 'a model of an unknown class'}, which is not supported", where=folder)
    kind, part = COMPONENTS[name]
    weights = weight_files(folder, layouts.STEMS[part])
    layout = layouts.Layout(folder, {}, {part: config}, {part: weights}, {})
    tensors = _tensors(layout, part)
    found = {"kind": kind, "format": f"{name} folder"}
    if part == "unet":
        found |= _named(_family({name: tensor.shape for name, tensor in tensors.items()}, folder))
    if part == "vae":
        found |= {key: config[key] for key in ("latent_channels", "scaling_factor", "shift_factor") if config.get(key)}
    if part == "text_encoder":
        found["width"] = config.get("hidden_size") or config.get("d_model")
    return {**found, **_total({part: _part(tensors.values(), name)}), "unapplied": []}


def _file(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in (".safetensors", *PICKLES):
        refuse_pickle(path)
        raise ModelError("is neither a model folder nor a weight file", where=path)
    header = read_header(path)
    if single.own_settings(header, path) or any(key.startswith(UNET) for key in header.tensors):
        return _single(path, header)
    if any("lora" in key for key in header.tensors):
        return _lora(path, header)
    found = {**_total({"all": _part(header.tensors.values(), None)}), "metadata": dict(header.metadata)}
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}
    try:
        family = family_of(shapes, path)
        return {"kind": "U-Net", "format": "single file, diffusers' names", **_named(family), **found, "unapplied": []}
    except ModelError as error:
        what = error.what
    if "encoder.conv_in.weight" in {key.removeprefix("first_stage_model.").removeprefix("vae.") for key in shapes}:
        return {"kind": "autoencoder", "format": "single file", **found, "unapplied": []}
    what = next((f"is {name}" for mark, name in ENCODERS.items() if any(mark in key for key in shapes)), what)
    return {"kind": "other", "format": "single file", "what": what, **found}


def _single(path: Path, header: Header) -> dict[str, Any]:
    """A whole model in one file; what loading would refuse is told in `unapplied` and `notes`."""
    try:
        plan, notes = single.plan_of(path, strict=False), []
    except ModelError as error:  # above all: nothing tells the prediction type
        plan, notes = single.plan_of(path, "epsilon", strict=False), [error.what]
    parts = {}
    for part in (part for part in plan.configs if part != "scheduler"):
        keys = [key for key, place in plan.places.items() if place.part == part]
        parts[part] = _part((header.tensors[key] for key in keys), None)
    scheduler = plan.configs["scheduler"]
    lacking = [part for part, found in parts.items() if not found["tensors"]]
    notes += [f"holds no {part}" for part in lacking]
    return {
        "kind": "model",
        "format": "single file" + (" with our settings" if KEY in header.metadata else ""),
        **_named(FAMILIES.get(plan.family)),
        "prediction_type": None if notes[: len(notes) - len(lacking)] else scheduler.get("prediction_type"),
        **_sizes(plan.configs["unet"], plan.configs["vae"]),
        **_total({part: found for part, found in parts.items() if part not in lacking}),
        "ignored": dict(plan.ignored),
        "metadata": {key: value for key, value in header.metadata.items() if key != KEY},
        "unapplied": _unapplied(dict.fromkeys(plan.unknown, "belongs to no part of the model")),
        "notes": notes,
    }


def _lora(path: Path, header: Header) -> dict[str, Any]:
    try:
        found = lora.read_lora_header(path)
    except ModelError as error:
        what = {"kind": "other", "format": "single file", "what": error.what}
        return {**what, **_total({"all": _part(header.tensors.values(), None)}), "metadata": dict(header.metadata)}
    family = _lora_family(found)
    ranks = Counter(entry.rank for entry in found.entries.values())
    alphas = Counter(entry.alpha for entry in found.entries.values())
    keys = [key for entry in found.entries.values() for key in entry.keys.values()]
    parts = Counter()
    for layer, entry in found.entries.items():
        parts[_lora_part(layer)] += sum(prod(shape) for role, shape in entry.shapes.items() if role != "alpha")
    return {
        "kind": "DoRA" if found.dora else "LoRA",
        "format": f"{found.format} keys",
        **_named(family),
        "base_model": next((found.metadata[key] for key in BASES if found.metadata.get(key)), None),
        "lora": {
            "layers": len(found.entries),
            "rank": _one_or_all(ranks),
            "alpha": None if found.assumed == len(found.entries) else _one_or_all(alphas),
            "alpha_assumed": found.assumed,  # layers that tell none: alpha = rank
        },
        "parameters": sum(parts.values()),
        "dtypes": _dtypes(header.tensors[key] for key in keys),
        "parts": {part: {"parameters": count} for part, count in parts.items()},
        "metadata": dict(found.metadata),
        "unapplied": _unapplied(_unapplied_of(found, family)),
    }


BASES = ("ss_sd_model_name", "modelspec.title", "ss_base_model_version", "modelspec.architecture")


def _unapplied_of(found: lora.LoraHeader, family: Family | None) -> dict[str, str]:
    """Key -> why no model of the family has a place for it."""

    reasons = dict.fromkeys(found.unknown, "is nothing of a low-rank update")
    if family is None:
        return reasons
    try:
        left = lora.match_layers(found, target_for(family), allow_unapplied=True).unapplied
    except ModelError as error:
        return reasons | {key: error.what for entry in found.entries.values() for key in entry.keys.values()}
    return {key: reasons.get(key, f"{family.title} has no such layer") for key in left}


def _lora_part(layer: str) -> str:
    if layer.startswith(("text_encoder_2.", "lora_te2_")):
        return "text_encoder_2"
    return "text_encoder" if layer.startswith(("text_encoder.", "lora_te_", "lora_te1_")) else "unet"


def _lora_family(found: lora.LoraHeader) -> Family | None:
    """By the width of the text that its layers attend to, else by what the header says, else by its text encoders."""
    layers = {layer.replace("_", "."): entry.shapes["down"] for layer, entry in found.entries.items()}
    cross = {shape[1] for layer, shape in layers.items() if layer.endswith(("attn2.to.k", "attn2.to.v"))}
    if cross:
        return FAMILIES.get(WIDTHS.get(min(cross), "")) if len(cross) == 1 else None
    version = found.metadata.get("ss_base_model_version", "")
    said = next((name for start, name in VERSIONS.items() if version.startswith(start)), None)
    if said is None and any(layer.startswith(("text_encoder_2.", "lora_te2_")) for layer in found.entries):
        said = "xl"
    if said is None:
        widths = {shape[1] for layer, shape in layers.items() if "self.attn" in layer}
        said = WIDTHS.get(min(widths)) if len(widths) == 1 else None
    return FAMILIES.get(said or "")


def _one_or_all(counts: Mapping[float, int]) -> Any:
    """The one value, or how many layers have which."""
    return next(iter(counts)) if len(counts) == 1 else {f"{value:g}": n for value, n in sorted(counts.items())}


def _unapplied(reasons: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "why": why} for key, why in reasons.items()]


def _family(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Family | None:
    try:
        return family_of(shapes, where)
    except ModelError:
        return None


def _named(family: Family | None) -> dict[str, Any]:
    return {"family": family and family.name, "title": family.title if family else OWN_WIDTH}


def _sizes(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
    factor, side = 2 ** (len(vae.get("block_out_channels", [0])) - 1), unet.get("sample_size")
    return {
        "resolution": side * factor if isinstance(side, int) else None,
        "cross_attention_dim": unet.get("cross_attention_dim"),
        "in_channels": unet.get("in_channels", 4),
        "latent_channels": vae.get("latent_channels", 4),
        "scaling_factor": vae.get("scaling_factor"),
    }


def _tensors(layout: layouts.Layout, part: str) -> dict[str, Tensor]:
    return {name: tensor for path in layout.shards(part) for name, tensor in read_header(path).tensors.items()}


def _part(tensors: Iterable[Tensor], kind: str | None) -> dict[str, Any]:
    tensors = list(tensors)
    found = {"class": kind} if kind else {}
    return {
        **found,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "tensors": len(tensors),
        "bytes": sum(tensor.size for tensor in tensors),
        "dtypes": _dtypes(tensors),
    }


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """How many parameters are stored in which type, the commonest first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[SHORT.get(tensor.dtype, tensor.dtype.lower())] += prod(tensor.shape)
    return dict(counts.most_common())


def _total(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the parts, and the parts where there are names for them."""
    dtypes: Counter[str] = Counter()
    for part in parts.values():
        dtypes.update(part["dtypes"])
    found = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")}
    return {**found, "dtypes": dict(dtypes.most_common()), **({} if "all" in parts else {"parts": dict(parts)})}


def as_text(found: Mapping[str, Any]) -> str:
    """The same for people: one line for each thing, long lists and texts cut."""
    lines = [("", found["path"])]
    for key in ("kind", "what", "format", "title", "prediction_type", "base_model", "resolution", "run"):
        if found.get(key):
            lines.append((key.replace("_", " ").replace("title", "family"), found[key]))
    for key, value in found.get("lora", {}).items():
        lines.append((key.replace("_", " "), json.dumps(value) if isinstance(value, dict) else value))
    lines.append(("parameters", f"{found['parameters']:,} ({_list(found['dtypes'])})"))
    for part, entry in found.get("parts", {}).items():
        lines.append(
            (f"  {part}", f"{entry['parameters']:,} {entry.get('class', '')} {_list(entry.get('dtypes', {}))}")
        )
    for key, value in list(found.get("metadata", {}).items())[:SHOWN]:
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append((f"  {key}", text if len(text) <= 100 else f"{text[:100]}… ({len(text):,} characters)"))
    for note in found.get("notes", ()):
        lines.append(("note", note))
    unapplied = found.get("unapplied", [])
    if unapplied:
        lines.append(("unapplied", f"{len(unapplied)} keys would not be applied"))
    for entry in unapplied[:10]:
        lines.append((f"  {entry['key']}", entry["why"]))
    return "\n".join(_printable(f"{name:<16} {value}" if name else str(value)) for name, value in lines)


def _list(dtypes: Mapping[str, int]) -> str:
    return ", ".join(dtypes)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "·" for c in " ".join(text.split("\n"))).rstrip()
