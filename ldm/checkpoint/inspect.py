"""What a model, an autoencoder, a text encoder or a LoRA on disk is, from settings and headers alone; no torch.

No weights are read except a LoRA's alphas: single numbers beside its matrices.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ldm.checkpoint import few_steps, lora, single
from ldm.checkpoint import folder as layouts
from ldm.checkpoint.families import FAMILIES, Family, family_of
from ldm.checkpoint.folder import default_folder, weight_files
from ldm.checkpoint.lora.read import FILE as LORA_FILE
from ldm.checkpoint.lora.target import target_for
from ldm.checkpoint.memory import memory_of
from ldm.checkpoint.safety import PICKLES, Header, Tensor, read_header, read_json, refuse_pickle
from ldm.checkpoint.single.header import KEY
from ldm.checkpoint.single.names import UNET
from ldm.checkpoint.single.plan import fp8_kinds
from ldm.errors import ModelError
from ldm.nn.mmdit_config import FLUX, SD3, MMDiTConfig

BARE = ("double_blocks.0.", "joint_blocks.0.")  # beginnings of names in BFL's and Stability AI's transformers alone
SHORT = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16", "F8_E4M3": "fp8_e4m3", "F8_E5M2": "fp8_e5m2"}
UNKNOWN_FAMILY = "sizes of no known family"
COMPONENTS = {  # class in a component's config.json -> (kind, the component's name)
    "AutoencoderKL": ("autoencoder", "vae"),
    "UNet2DConditionModel": ("U-Net", "unet"),
    SD3: ("flow transformer", "transformer"),
    FLUX: ("flow transformer", "transformer"),
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


def inspect(path: str | os.PathLike) -> dict[str, Any]:
    """What is at `path`: a model's folder or file, one part of it, a training run, a LoRA, or "default".

    The keys: kind, format, family, prediction_type, dtypes, parameters and parts (where there are some), lora (rank,
    alpha), the header's metadata, and `unapplied`: keys that loading would refuse, each with the reason. A sound file
    that is none of these has the kind "other" and a description in `what`. Raises ModelError: pickles, damaged and
    missing files.
    """
    path = default_folder() if str(path) == "default" else Path(os.path.expanduser(path))
    if not path.exists():
        raise ModelError("no such file or folder", where=path)
    info = _folder(path) if path.is_dir() else _file(path)
    return {"path": str(path), **info}


def _folder(folder: Path) -> dict[str, Any]:
    if (folder / layouts.INDEX).is_file():
        return _model(layouts.read_layout(folder))
    if (folder / "config.json").is_file():
        return _component(folder)
    if (folder / "model").is_dir():
        return {**_folder(folder / "model"), "run": str(folder)}
    for part in ("vae", "text_encoder"):  # a stage of training leaves this
        if (folder / part / "config.json").is_file():
            return _component(folder / part)
    weights = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".safetensors")
    if (folder / LORA_FILE).is_file() or len(weights) == 1:
        return _file(folder / LORA_FILE if (folder / LORA_FILE).is_file() else weights[0])
    if weights:
        raise ModelError(f"holds {len(weights)} .safetensors files and no settings", where=folder, hint="name a file")
    if (folder / "checkpoints").is_dir():
        raise ModelError("is a run without a model yet", where=folder, hint="continue it with --resume")
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
    scheduler, unet = layout.configs["scheduler"], layout.configs[layout.network]
    family = _family({name: tensor.shape for name, tensor in tensors[layout.network].items()}, layout.folder)
    if layout.text_class("text_encoder") in layouts.T5:
        family = None
    card = layouts.card_settings(layouts.read_card(layout.folder) or "")
    return {
        "kind": "model",
        "format": f"{layout.index['_class_name']} folder{variant}",
        **(_named(family) if layout.network == "unet" else _flow_family(unet, layout.index["_class_name"])),
        "prediction_type": "flow" if _flow(scheduler) else scheduler.get("prediction_type", "epsilon"),
        **_sizes(unet, layout.configs["vae"]),
        **_total(parts),
        **_memory({part: {name: one.shape for name, one in found.items()} for part, found in tensors.items()}),
        "manifest": bool(layout.manifest),
        **(
            {}
            if "ldm" in card or layout.network != "unet"
            else _few_steps(few_steps.of_model(layout.folder.resolve().name, scheduler, unet, {}))
        ),
        "metadata": {key: value for key, value in card.items() if isinstance(value, str | int | float | dict)},
        "unapplied": [],
    }


def _memory(shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> dict[str, Any]:
    """`memory` of a flow transformer's whole model; {} for others."""
    return {"memory": memory_of(shapes)} if "transformer" in shapes else {}


def _flow(scheduler: Mapping[str, Any]) -> bool:
    if str(scheduler.get("_class_name")).startswith("FlowMatch"):
        return True
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
    info = {"kind": kind, "format": f"{name} folder"}
    if part == "unet":
        info |= _named(_family({name: tensor.shape for name, tensor in tensors.items()}, folder))
    if part == "transformer":
        info |= _flow_family(config)
    if part == "vae":
        info |= {key: config[key] for key in ("latent_channels", "scaling_factor", "shift_factor") if config.get(key)}
    if part == "text_encoder":
        info["width"] = config.get("hidden_size") or config.get("d_model")
    return {**info, **_total({part: _part(tensors.values(), name)}), "unapplied": []}


def _file(path: Path) -> dict[str, Any]:
    if path.suffix.lower() not in (".safetensors", *PICKLES):
        refuse_pickle(path)
        raise ModelError("is neither a model folder nor a weight file", where=path)
    header = read_header(path)
    stored, lora = single.stored_settings(header, path), any("lora" in key for key in header.tensors)
    if stored is None and not lora and any(key.removeprefix(UNET).startswith(BARE) for key in header.tensors):
        try:
            return _single(path, header)
        except ModelError as error:  # a relative of FLUX, or quantised weights
            return _other(header, error.what)
    if stored is not None or any(key.startswith(UNET) for key in header.tensors):
        return _single(path, header)
    if lora:
        return _lora(path, header)
    if any(key.startswith("model_ema.") for key in header.tensors):
        return _other(header, "holds averaged weights (model_ema) and no U-Net under its own names")
    info = {**_total({"all": _part(header.tensors.values(), None)}), "metadata": dict(header.metadata)}
    shapes = {key: tensor.shape for key, tensor in header.tensors.items()}
    try:
        family = family_of(shapes, path)
        return {"kind": "U-Net", "format": "single file, diffusers' names", **_named(family), **info, "unapplied": []}
    except ModelError as error:
        what = error.what
    if "encoder.conv_in.weight" in {key.removeprefix("first_stage_model.").removeprefix("vae.") for key in shapes}:
        return {"kind": "autoencoder", "format": "single file", **info, "unapplied": []}
    what = next((f"is {name}" for mark, name in ENCODERS.items() if any(mark in key for key in shapes)), what)
    return {"kind": "other", "format": "single file", "what": what, **info}


def _other(header: Header, what: str) -> dict[str, Any]:
    """A sound file that is nothing of ours."""
    info = {"kind": "other", "format": "single file", "what": what, "metadata": dict(header.metadata)}
    return {**info, **_total({"all": _part(header.tensors.values(), None)})}


def _single(path: Path, header: Header) -> dict[str, Any]:
    """A whole model in one file; `unapplied` and `notes` list what loading would refuse, or what has to be given."""
    try:
        plan, notes = single.plan_of(path, strict=False), []
    except ModelError as error:  # most often: the prediction type is unknown
        plan, notes = single.plan_of(path, "epsilon", strict=False), [error.what]
    parts = {}
    for part in (part for part in plan.configs if part != "scheduler"):
        keys = [key for key, destination in plan.destinations.items() if destination.part == part]
        parts[part] = _part((header.tensors[key] for key in keys), None)
    scheduler = plan.configs["scheduler"]
    network, flow = plan.configs[plan.network], plan.network == "transformer"
    found = None if plan.card or flow else few_steps.of_model(path.stem, scheduler, network, header.metadata)
    missing = [part for part, entry in parts.items() if not entry["tensors"]]
    unsure = bool(notes)
    notes += [f"holds no {part}" for part in (plan.absent if flow else missing)]
    notes += [f"weights in {kind} are read as 16 or 32 bits" for kind in sorted(fp8_kinds(plan))]
    return {
        "kind": "model",
        "format": "single file" + (" with our settings" if KEY in header.metadata else ""),
        **(_flow_family(network) if flow else _named(FAMILIES.get(plan.family))),
        "prediction_type": "flow" if _flow(scheduler) else None if unsure else scheduler.get("prediction_type"),
        **_sizes(network, plan.configs["vae"]),
        **_total({part: entry for part, entry in parts.items() if part not in missing}),
        **_memory({part: plan.shapes(part) for part in parts if part not in missing}),
        "ignored": dict(plan.ignored),
        "metadata": {key: value for key, value in header.metadata.items() if key != KEY},
        "unapplied": _unapplied(dict.fromkeys(plan.unknown, "belongs to no part of the model")),
        **_few_steps(found, notes),
    }


def _few_steps(found: few_steps.Found | None, notes: Iterable[str] = ()) -> dict[str, Any]:
    """`few_steps`: the kind and settings that a file was made for; what is in doubt is a note."""
    if found is None or found.sampling is None:
        return {"notes": [*notes, *([found.line] if found else [])]}
    return {"few_steps": {"kind": found.sampling.kind, **found.sampling.defaults}, "notes": list(notes)}


def _lora(path: Path, header: Header) -> dict[str, Any]:
    try:
        adapter = lora.read_lora_header(path)
    except ModelError as error:
        return _other(header, error.what)
    family = None if _flow_lora(adapter) else _lora_family(adapter)
    ranks = Counter(entry.rank for entry in adapter.entries.values())
    alphas = Counter(entry.alpha for entry in adapter.entries.values())
    keys = [key for entry in adapter.entries.values() for key in entry.keys.values()]
    parts = Counter()
    for layer, entry in adapter.entries.items():
        parts[_lora_part(layer)] += sum(prod(shape) for role, shape in entry.shapes.items() if role != "alpha")
    return {
        "kind": "DoRA" if adapter.dora else "LoRA",
        "format": f"{adapter.format} keys",
        **(_flow_lora(adapter) or _named(family)),
        "base_model": next((adapter.metadata[key] for key in BASES if adapter.metadata.get(key)), None),
        "lora": {
            "layers": len(adapter.entries),
            "rank": _one_or_all(ranks),
            "alpha": None if adapter.assumed == len(adapter.entries) else _one_or_all(alphas),
            "alpha_assumed": adapter.assumed,  # layers without an alpha in the file: alpha = rank
        },
        "parameters": sum(parts.values()),
        "dtypes": _dtypes(header.tensors[key] for key in keys),
        "parts": {part: {"parameters": count} for part, count in parts.items()},
        "metadata": dict(adapter.metadata),
        "unapplied": _unapplied(_unapplied_of(adapter, family)),
        **_few_steps(few_steps.of_lora(adapter)),
    }


FLOW_LAYERS = {
    r"(double|single|single\.transformer)\.blocks\.": "FLUX.1",
    r"\bjoint\.blocks\.": "Stable Diffusion 3",
    r"(^| |unet\.|transformer\.)transformer\.blocks\.": "Stable Diffusion 3",
}
BASES = ("ss_sd_model_name", "modelspec.title", "ss_base_model_version", "modelspec.architecture")


def _unapplied_of(adapter: lora.LoraHeader, family: Family | None) -> dict[str, str]:
    """Key -> why no model of the family could apply it."""
    reasons = dict.fromkeys(adapter.unknown, "belongs to no low-rank update")
    if family is None:
        return reasons
    try:
        left = lora.match_layers(adapter, target_for(family), allow_unapplied=True).unapplied
    except ModelError as error:
        return reasons | {key: error.what for entry in adapter.entries.values() for key in entry.keys.values()}
    return {key: reasons.get(key, f"{family.title} has no such layer") for key in left}


def _flow_lora(adapter: lora.LoraHeader) -> dict[str, Any]:
    """What a LoRA of a flow transformer is for, by its layers' names; {} for others."""
    layers = " ".join(layer.replace("_", ".") for layer in adapter.entries)
    if title := next((title for mark, title in FLOW_LAYERS.items() if re.search(mark, layers)), None):
        return {"family": None, "title": title}
    return {}


def _lora_part(layer: str) -> str:
    if layer.startswith(("text_encoder_2.", "lora_te2_")):
        return "text_encoder_2"
    return "text_encoder" if layer.startswith(("text_encoder.", "lora_te_", "lora_te1_")) else "unet"


def _lora_family(adapter: lora.LoraHeader) -> Family | None:
    """The base model's family: by the width of the text, else by the header's metadata, else by its text encoders."""
    layers = {layer.replace("_", "."): entry.shapes["down"] for layer, entry in adapter.entries.items()}
    cross = {shape[1] for layer, shape in layers.items() if layer.endswith(("attn2.to.k", "attn2.to.v"))}
    if cross:
        return FAMILIES.get(WIDTHS.get(min(cross), "")) if len(cross) == 1 else None
    version = adapter.metadata.get("ss_base_model_version", "")
    name = next((name for start, name in VERSIONS.items() if version.startswith(start)), None)
    if name is None and any(layer.startswith(("text_encoder_2.", "lora_te2_")) for layer in adapter.entries):
        name = "xl"
    if name is None:
        widths = {shape[1] for layer, shape in layers.items() if "self.attn" in layer}
        name = WIDTHS.get(min(widths)) if len(widths) == 1 else None
    return FAMILIES.get(name or "")


def _one_or_all(counts: Mapping[float, int]) -> Any:
    """The one value, or value -> how many layers have it."""
    return next(iter(counts)) if len(counts) == 1 else {f"{value:g}": n for value, n in sorted(counts.items())}


def _unapplied(reasons: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "why": why} for key, why in reasons.items()]


def _family(shapes: Mapping[str, tuple[int, ...]], where: Path) -> Family | None:
    try:
        return family_of(shapes, where)
    except ModelError:
        return None


def _named(family: Family | None) -> dict[str, Any]:
    return {"family": family and family.name, "title": family.title if family else UNKNOWN_FAMILY}


def _flow_family(transformer: Mapping[str, Any], pipeline: str = "") -> dict[str, Any]:
    config = MMDiTConfig.from_diffusers(transformer)
    if pipeline == layouts.CLIP_PIPELINE:
        return {"family": None, "title": "a flow transformer with one CLIP"}
    if config.is_flux:
        name = "dev" if config.guidance_embeds else "schnell"
        return {"family": f"flux-{name}", "title": f"FLUX.1 ({name})"}
    return {"family": "sd35" if config.qk_norm else "sd3", "title": f"Stable Diffusion 3{'.5' * config.qk_norm}"}


def _sizes(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
    factor, side = 2 ** (len(vae.get("block_out_channels", [0])) - 1), unet.get("sample_size")
    if "joint_attention_dim" in unet:
        config = MMDiTConfig.from_diffusers(unet)
        side, unet = config.sample_size, {"cross_attention_dim": config.text_width, "in_channels": config.in_channels}
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
    info = {"class": kind} if kind else {}
    return {
        **info,
        "parameters": sum(prod(tensor.shape) for tensor in tensors),
        "tensors": len(tensors),
        "bytes": sum(tensor.size for tensor in tensors),
        "dtypes": _dtypes(tensors),
    }


def _dtypes(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Type -> how many parameters are stored in it, the most common first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[SHORT.get(tensor.dtype, tensor.dtype.lower())] += prod(tensor.shape)
    return dict(counts.most_common())


def _total(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the parts, and the parts themselves where they have names."""
    dtypes: Counter[str] = Counter()
    for part in parts.values():
        dtypes.update(part["dtypes"])
    totals = {key: sum(part[key] for part in parts.values()) for key in ("parameters", "bytes")}
    return {**totals, "dtypes": dict(dtypes.most_common()), **({} if "all" in parts else {"parts": dict(parts)})}
