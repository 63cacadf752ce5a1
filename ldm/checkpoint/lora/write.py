"""Write LoRA files for PEFT and diffusers or for A1111 and ComfyUI (kohya's layout), with a model card."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import ldm
from ldm.checkpoint.lora.names import CLIP, FLOW_PREFIX, kohya_name, peft_name, sgm_names
from ldm.checkpoint.lora.read import FILE, METADATA, WORDS
from ldm.checkpoint.lora.target import networks
from ldm.checkpoint.safety import MANIFEST, write_manifest
from ldm.checkpoint.tensors import Source, write_tensors
from ldm.checkpoint.types import Model
from ldm.console import say
from ldm.errors import ModelError
from ldm.files import atomic_folder, atomic_write
from ldm.nn.mmdit_config import MMDiTConfig

if TYPE_CHECKING:
    import torch

    from ldm.nn.lora import LowRank

Layers = Mapping[str, Mapping[str, "LowRank"]]  # part (unet, text_encoder, text_encoder_2) -> layer -> update
CARD = "README.md"
UNREAD = "add_embedding."  # layers that diffusers does not find in kohya's files
UNET_NAMES = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
TEXT_NAMES = ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight", "lora_magnitude_vector.weight")


def write_lora(
    folder: str | Path,
    model: Model,
    layers: Layers,
    layout: str = "peft",
    dtype: torch.dtype | None = None,
    note: str = "",
) -> Path:
    """Write updates of `model`'s layers into a folder with a manifest and a model card; returns the file's path.

    layout  "peft": pytorch_lora_weights.safetensors, alphas in the header alone (diffusers refuses others); "kohya":
            <folder's name>.safetensors, alphas in tensors and in the header, XL's layers by the original code's names
    dtype   of the weights; None leaves them as they are
    note    a paragraph for the card: what it was trained on
    Raises ModelError for NaN and infinity, layers that the model does not have, and what a layout cannot hold.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / CARD).is_file()):
        raise ModelError("exists and is no LoRA's folder", where=folder, hint="choose a new folder")
    if layout not in LAYOUTS:
        raise ModelError(f"unknown layout {layout!r}", hint=f"choose from: {', '.join(LAYOUTS)}")
    name = folder.resolve().name
    files = {layout: FILE if layout == "peft" else f"{name}.safetensors"}
    contents = _contents(folder, model, layers, files, dtype)
    with atomic_folder(folder) as new:
        for file, content in contents.items():
            write_tensors(new / file, *content)
        write_manifest(new)
        (new / CARD).write_text(_card(name, files, model, layers, note), encoding="utf-8")
    return folder / files[layout]


def write_lora_into(
    folder: str | Path,
    name: str,
    model: Model,
    layers: Layers,
    dtype: torch.dtype | None = None,
    note: str = "",
    words: Iterable[str] = (),
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write updates into a folder that also holds other files, such as a run's: pytorch_lora_weights.safetensors in
    PEFT's layout, name.safetensors in kohya's, a model card, and a manifest of the two; returns the first one's path.

    Each file is written whole or not at all. `words` are the words of the captions, for models that know few;
    `metadata` goes into both headers. Raises ModelError like `write_lora`.
    """
    folder = Path(folder)
    files = {"peft": FILE, "kohya": f"{name}.safetensors"}
    more = {**metadata, **({WORDS: json.dumps(sorted(words))} if words else {})}
    contents = _contents(folder, model, layers, files, dtype, more)
    (folder / MANIFEST).unlink(missing_ok=True)  # it must not vouch for the old files while new ones are written
    for file, content in contents.items():
        atomic_write(folder / file, lambda path, content=content: write_tensors(path, *content))
    write_manifest(folder, list(contents))
    atomic_write(folder / CARD, _card(name, files, model, layers, note))
    return folder / FILE


def _contents(
    folder: Path,
    model: Model,
    layers: Layers,
    files: Mapping[str, str],
    dtype: torch.dtype | None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, tuple[dict[str, Source], dict[str, str]]]:
    """File's name -> its tensors and metadata; `files`: layout -> name; `more` goes into the metadata of each."""
    layers = {part: dict(updates) for part, updates in layers.items() if updates}
    _check(layers, model, folder)
    contents = {}
    for layout, file in files.items():
        tensors, metadata = LAYOUTS[layout](model, layers)
        sources = {name: _source(name, tensor, dtype, folder) for name, tensor in tensors.items()}
        contents[file] = sources, dict(sorted({"format": "pt", **metadata, **more}.items()))
    return contents


def _check(layers: Layers, model: Model, folder: Path) -> None:
    from ldm.nn.lora import layers_of

    if not layers:
        raise ModelError("there is no layer to write", where=folder)
    known = {part: layers_of(module) for part, module in networks(model).items()}
    for part, updates in layers.items():
        if missing := [name for name in updates if name not in known.get(part, {})]:
            raise ModelError(f"the model has no layer {part}.{missing[0]}", where=folder)


def _source(name: str, tensor: torch.Tensor, dtype: torch.dtype | None, folder: Path) -> Source:
    tensor = tensor.detach().to("cpu", tensor.dtype if name.endswith(".alpha") else dtype)
    if not tensor.isfinite().all():
        raise ModelError(f"{name!r} holds NaN or infinity", where=folder, hint="nothing was written")
    return Source(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _peft(model: Model, layers: Layers) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata in the layout of PEFT as diffusers saves it.

    Text encoders have diffusers' older names and PEFT's inner one for magnitudes: diffusers 0.42 with transformers 5
    cannot tell the newer ones in every case.
    """
    tensors, settings, flow = {}, {}, is_flow(model)
    for part, updates in layers.items():
        down, up, magnitude = UNET_NAMES if part == "unet" else TEXT_NAMES
        for name, update in updates.items():
            key = peft_name(part, name, flow)
            tensors |= {f"{key}.{down}": update.down, f"{key}.{up}": update.up}
            if update.magnitude is not None:
                wide = (1, -1, 1, 1) if update.down.ndim == 4 else (-1,)
                tensors[f"{key}.{magnitude}"] = update.magnitude.reshape(wide)
        prefix = FLOW_PREFIX if flow and part == "unet" else part
        settings |= {f"{prefix}.{key}": value for key, value in _peft_settings(part, updates).items()}
    return tensors, {METADATA: json.dumps(settings, sort_keys=True)}


def _peft_settings(part: str, updates: Mapping[str, LowRank]) -> dict[str, Any]:
    """PEFT's LoraConfig, as far as needed; layers without `text_model.`, because PEFT finds them in both forms."""
    updates = {name.removeprefix(CLIP): update for name, update in updates.items()}
    if len({update.magnitude is None for update in updates.values()}) > 1:
        raise ModelError("PEFT's layout cannot hold LoRA and DoRA in one part", where=part, hint="use layout 'kohya'")
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: _plain(update.alpha) for name, update in updates.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(updates),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "lora_bias": False,
        "bias": "none",
    }


def _kohya(model: Model, layers: Layers) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors and metadata as kohya's sd-scripts writes them."""
    import torch

    xl = is_xl(model)
    originals = sgm_names(layers.get("unet", {}), model.unet.config) if xl else {}
    tensors = {}
    for part, updates in layers.items():
        for name, update in updates.items():
            key = kohya_name(part, name, originals, xl, is_flow(model))
            tensors |= {f"{key}.lora_down.weight": update.down, f"{key}.lora_up.weight": update.up}
            tensors[f"{key}.alpha"] = torch.tensor(float(update.alpha))
            if update.magnitude is not None:
                tensors[f"{key}.dora_scale"] = update.magnitude.reshape(-1, *[1] * (update.down.ndim - 1))
    every = [update for updates in layers.values() for update in updates.values()]
    version = "sdxl_base_v1-0" if xl else {768: "sd_v1", 1024: "sd_v2"}.get(model.unet.config.text_width)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(_commonest({i: update.rank for i, update in enumerate(every)})),
        "ss_network_alpha": str(_commonest({i: _plain(update.alpha) for i, update in enumerate(every)})),
        "ss_sd_model_name": model.name,
        "ss_training_comment": f"written by ldm {ldm.__version__}",
    }
    return tensors, metadata | ({"ss_base_model_version": version} if version else {})


LAYOUTS = {"peft": _peft, "kohya": _kohya}


def is_xl(model: Model) -> bool:
    return not is_flow(model) and model.unet.config.addition_embed_type == "text_time"


def is_flow(model: Model) -> bool:
    """Whether the model has a flow transformer."""
    return isinstance(model.unet.config, MMDiTConfig)


def _commonest(values: Mapping[Any, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _plain(number: float) -> int | float:
    return int(number) if float(number).is_integer() else float(number)


def _card(name: str, files: Mapping[str, str], model: Model, layers: Layers, note: str) -> str:
    """A short model card with front matter for the hub; `files`: layout -> name."""
    every = [update for updates in layers.values() for update in updates.values()]
    kind = "DoRA" if any(update.magnitude is not None for update in every) else "LoRA"
    rank, alpha = (", ".join(sorted({f"{getattr(u, field):g}" for u in every})) for field in ("rank", "alpha"))
    parts = ", ".join(f"{len(updates)} layers of {part}" for part, updates in layers.items() if updates)
    base = f"{model.name or 'a model'}{f' (sha256 {model.hash[:12]})' if model.hash else ''}"
    settings = {"kind": kind.lower(), "layout": "both" if len(files) > 1 else next(iter(files))}
    head = {"tags": ["lora", "text-to-image", "stable-diffusion"], "ldm": settings}
    first = next(iter(files.values()))
    unread = sum(name.startswith(UNREAD) for name in layers.get("unet", {}))
    if "kohya" in files and unread:
        lost = f"diffusers leaves out {unread} layers of `{files['kohya']}` ({UNREAD}…)"
        note = f"{note}{chr(10) * 2 if note else ''}{lost}; A1111 and ComfyUI read them."
        say(f"{lost.replace('`', '')}: use {FILE} there" if "peft" in files else lost.replace("`", ""))
    kohya = f", or put `{files['kohya']}` into the LoRA folder of A1111 or ComfyUI" if "kohya" in files else ""
    return f"""---
{json.dumps(head)}
---
# {name}

A {kind} for {base}: {parts}; rank {rank}, alpha {alpha}.
{note and f"{chr(10)}{note}{chr(10)}"}
This folder holds {" and ".join(f"`{file}`" for file in files.values())}. To use it:
`ldm generate "…" --lora {first}:0.8`, or `pipe.load_lora_weights(".", weight_name="{first}")` in diffusers{kohya}.
"""
