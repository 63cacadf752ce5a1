"""Read LoRA files: the header first (no torch), with every check that it allows, then the tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import struct
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.lora.names import FLOW_PREFIX, OTHER_KINDS, PARTS, split_key
from ldm.checkpoint.safety import Header, read_header, read_json, read_manifest, read_tensors, refuse_pickle
from ldm.errors import ConfigError, ModelError, nearest

if TYPE_CHECKING:
    from ldm.nn.lora import LowRank

FILE = "pytorch_lora_weights.safetensors"  # in the folders that PEFT's and diffusers' tools write
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # in the folders of save_pretrained
METADATA = "lora_adapter_metadata"  # in the header of diffusers' files: JSON of PEFT's settings, a prefix for each part
WORDS = "ldm_words"  # in the header of ours: JSON of the captions' words, where the model's text encoder knows few
UNET_LAYERS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding.")
UNET_LAYERS += ("transformer_blocks.", "single_transformer_blocks.")
NUMBERS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


@dataclass(frozen=True)
class Entry:
    """One layer in a LoRA file."""

    keys: Mapping[str, str]  # down, up, alpha, magnitude -> the tensor's key
    shapes: Mapping[str, tuple[int, ...]]  # of the same
    alpha: float

    @property
    def rank(self) -> int:
        return self.shapes["down"][0]


@dataclass(frozen=True)
class LoraHeader:
    """What a LoRA file holds, known before any weight is read."""

    path: Path
    format: str  # "kohya", "peft" (lora_A, lora_B) or "diffusers" (its older names)
    entries: Mapping[str, Entry]  # by the file's own names of the layers
    unknown: tuple[str, ...]  # keys that belong to no low-rank update
    metadata: Mapping[str, str]
    assumed: int  # layers without an alpha in the file: theirs is the rank
    by_metadata: int = 0  # layers whose alpha kohya's ss_network_alpha alone gives

    @property
    def name(self) -> str:
        """The name by which a prompt's <lora:name:1> finds it."""
        return self.path.parent.name if self.path.name == FILE else self.path.stem

    @property
    def words(self) -> frozenset[str]:
        """The words of the captions that it was trained on, where the file lists them."""
        try:
            words = json.loads(self.metadata.get(WORDS, "[]"))
        except (ValueError, RecursionError):
            return frozenset()
        return frozenset(word for word in words if isinstance(word, str)) if isinstance(words, list) else frozenset()

    @property
    def dora(self) -> bool:
        return any("magnitude" in entry.keys for entry in self.entries.values())


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file with its weights, fp32 on the CPU."""

    header: LoraHeader
    layers: Mapping[str, LowRank]  # by the file's own names of the layers
    hash: str  # sha256 of the file
    short_hash: str  # the first 12 digits of A1111's hash of a LoRA: sha256 without the header


def lora_path(path: str | Path) -> Path:
    """The LoRA's file: `path` itself, or the one inside that folder. Raises ModelError."""
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return path
    if (path / FILE).is_file():
        return path / FILE
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors")
    if len(files) == 1:
        return files[0]
    for file in sorted(path.iterdir()):
        if file.is_file() and not files:
            refuse_pickle(file)
    what = f"holds {len(files)} .safetensors files" if files else f"has no {FILE}"
    raise ModelError(what, where=path, hint="name the LoRA's file")


def find_lora(name: str, folder: str | os.PathLike) -> Path:
    """The LoRA `name` in a folder or below it: name.safetensors, or a folder of that name.

    Raises ConfigError where there is none (with the nearest name) or more than one.
    """
    folder = Path(os.path.expanduser(folder))
    if not folder.is_dir():
        raise ConfigError("no such folder", where=f"lora_dir {folder}")
    known: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.stem == path.parent.name and (path.parent / FILE).is_file():
            continue  # the same in kohya's layout, as fine-tuning leaves it beside the other
        known.setdefault(_plain(path.parent.name if path.name == FILE else path.stem), []).append(path)
    plain = _plain(name.removesuffix(".safetensors"))
    matches = known.get(plain.rpartition("/")[2], [])
    if "/" in plain:  # sub/name, as ComfyUI has it
        matches = [path for path in matches if f"/{plain}" in f"/{_plain(path.relative_to(folder).as_posix())}"]
    if not matches:
        hint = nearest(name, list(known)[:50]) if known else "there is no LoRA in this folder"
        raise ConfigError(f"no LoRA is named {name!r:.80}", where=folder, hint=hint)
    if len(matches) > 1:
        paths = ", ".join(str(path.relative_to(folder)) for path in matches[:3])
        raise ConfigError(f"{len(matches)} LoRAs are named {name!r}: {paths}", where=folder, hint="rename one")
    return matches[0]


def _plain(name: str) -> str:
    """A name in one Unicode form: files from Macs have another than what people type."""
    return unicodedata.normalize("NFC", name)


def read_lora_header(path: str | Path) -> LoraHeader:
    """Check all about a LoRA file that needs no weight.

    Raises ModelError: no file, a pickle, malformed, no LoRA at all, half of a layer is missing, an alpha or rank that
    is no number.
    """
    path = lora_path(path)
    header = read_header(path)
    layers: dict[str, dict[str, str]] = {}
    unknown = []
    for key in header.tensors:
        split = split_key(key)
        if split is None:
            unknown.append(key)
        elif layers.setdefault(split[0], {}).setdefault(split[1], key) != key:
            raise ModelError(f"{key} occurs twice under different names", where=path)
    for layer in [layer for layer, keys in layers.items() if not {"down", "up"} & keys.keys()]:
        unknown += layers.pop(layer).values()
    _check_kind(layers, unknown, path)
    shapes = {layer: {role: header.tensors[key].shape for role, key in keys.items()} for layer, keys in layers.items()}
    ranks = {layer: _rank(layer, layers[layer], its_shapes, path) for layer, its_shapes in shapes.items()}
    header = _with_peft_config(header, path)
    alphas, assumed = _alphas(header, layers, ranks, path)
    entries = {layer: Entry(keys, shapes[layer], alphas[layer]) for layer, keys in layers.items()}
    without = [layer for layer, keys in layers.items() if "alpha" not in keys]
    by_metadata = 0 if METADATA in header.metadata else len(without) - assumed
    return LoraHeader(path, _format(layers), entries, tuple(unknown), header.metadata, assumed, by_metadata)


def read_lora(path: str | Path) -> LoraFile:
    """A LoRA or DoRA file (or the folder that holds it) in any layout of PEFT, diffusers or kohya.

    Raises ModelError as read_lora_header does, for NaN and infinity, and where a manifest beside the file disagrees.
    """
    import torch

    from ldm.nn.lora import LowRank

    header = read_lora_header(path)
    tensors, digest = read_tensors(header.path, torch.float32, "cpu")
    _check_manifest(header.path, digest)

    def update(entry: Entry) -> LowRank:
        magnitude = tensors[entry.keys["magnitude"]].flatten() if "magnitude" in entry.keys else None
        return LowRank(tensors[entry.keys["down"]], tensors[entry.keys["up"]], entry.alpha, magnitude)

    layers = {layer: update(entry) for layer, entry in header.entries.items()}
    return LoraFile(header, layers, digest, _short_hash(header.path))


def _check_kind(layers: Mapping[str, Any], unknown: list[str], path: Path) -> None:
    kind = next((kind for mark, kind in OTHER_KINDS.items() if any(mark in key for key in unknown)), None)
    if kind:
        raise ModelError(f"is an adapter of the kind {kind}, which is not supported", where=path, hint="use LoRA, DoRA")
    if not layers:
        first = ", ".join(unknown[:3])
        raise ModelError(f"holds no LoRA layer ({len(unknown)} other tensors: {first})", where=path)


def _rank(layer: str, keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], path: Path) -> int:
    """The layer's rank. Raises ModelError where the shapes of its tensors do not belong together."""
    if missing := {"down", "up"} - shapes.keys():
        raise ModelError(f"{layer} has no {missing.pop()} weight", where=path, hint="get the file again")
    down, up = shapes["down"], shapes["up"]
    flat = math.prod(up[2:]) == 1
    if not (len(down) in (2, 4) and len(up) in (2, 4) and flat and down[0] == up[1] and 0 not in (*down, *up)):
        raise ModelError(f"{layer} has weights of shapes {list(down)} and {list(up)}, which are no LoRA", where=path)
    if math.prod(shapes.get("alpha", ())) != 1:
        raise ModelError(f"{layer} has an alpha of shape {list(shapes['alpha'])}", where=path)
    magnitude = shapes.get("magnitude", (up[0],))
    peft = len(magnitude) > 1 and "_magnitude_vector" in keys["magnitude"]  # (1, out, 1, 1)
    if (magnitude[1:2] if peft else magnitude[:1]) != (up[0],) or math.prod(magnitude) != up[0]:
        what = f"{layer} has DoRA magnitudes of shape {list(magnitude)}, not one for each of {up[0]} outputs"
        raise ModelError(what, where=path, hint="those along the inputs are not supported")
    return down[0]


def _format(layers: Mapping[str, Mapping[str, str]]) -> str:
    if any(layer.startswith(("lora_unet_", "lora_te", "lora_transformer_")) for layer in layers):
        return "kohya"
    return "peft" if any(".lora_A." in keys["down"] for keys in layers.values()) else "diffusers"


def _alphas(
    header: Header, layers: Mapping[str, Mapping[str, str]], ranks: Mapping[str, int], path: Path
) -> tuple[dict[str, float], int]:
    """Each layer's alpha: from its tensor, else the header, else the rank; and how many layers take the rank."""
    from_tensors = _scalars(header, {layer: keys["alpha"] for layer, keys in layers.items() if "alpha" in keys}, path)
    from_header = _from_metadata(header.metadata, ranks, path)
    alphas = {**from_header, **from_tensors}
    for layer, alpha in alphas.items():
        if not math.isfinite(alpha):
            raise ModelError(f"the alpha of {layer} is {alpha}", where=path, hint="get the file again")
    return {layer: alphas.get(layer, float(rank)) for layer, rank in ranks.items()}, len(ranks.keys() - alphas.keys())


def _scalars(header: Header, keys: Mapping[str, str], path: Path) -> dict[str, float]:
    """The numbers in single-element tensors, each read where the header says it is."""
    values = {}
    with path.open("rb") as handle:
        for layer, key in keys.items():
            entry = header.tensors[key]
            handle.seek(entry.begin)
            raw = handle.read(entry.size)
            if entry.dtype == "BF16":  # the upper half of an fp32
                entry_format, raw = "<f", b"\0\0" + raw
            elif entry.dtype in NUMBERS:
                entry_format = NUMBERS[entry.dtype]
            else:
                raise ModelError(f"the alpha of {layer} has the dtype {entry.dtype}", where=path)
            values[layer] = float(struct.unpack(entry_format, raw)[0])
    return values


def _from_metadata(metadata: Mapping[str, str], ranks: Mapping[str, int], path: Path) -> dict[str, float]:
    """The alphas in the header's metadata, for the layers that it covers."""
    if METADATA in metadata:
        try:
            settings = json.loads(metadata[METADATA])
            return _peft_alphas(settings, ranks, path) if settings else {}
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ModelError(f"its {METADATA} cannot be understood", where=path, hint="get the file again") from None
    try:  # of the layers with the file's main rank; convolutions have their own, in their tensors
        alpha, rank = float(metadata["ss_network_alpha"]), int(metadata["ss_network_dim"])
    except (KeyError, ValueError):
        return {}
    return {layer: alpha for layer, its_rank in ranks.items() if its_rank == rank}


def _peft_alphas(settings: Mapping[str, Any], ranks: Mapping[str, int], path: Path) -> dict[str, float]:
    """lora_alpha, or alpha_pattern's for the layers that it names; times sqrt(rank) with rank-stabilised scaling."""
    alphas = {}
    for part in (*PARTS, FLOW_PREFIX):
        names = {layer: layer.removeprefix(f"{part}.") for layer in ranks if layer.startswith(f"{part}.")}
        if part == "unet" and not names:  # PEFT's own files name no part
            names = {layer: layer for layer in ranks if layer.startswith(UNET_LAYERS)}
        alpha = settings.get(f"{part}.lora_alpha")
        if alpha is None or not names:
            continue
        alphas |= dict.fromkeys(names, float(alpha))
        for pattern, value in (settings.get(f"{part}.alpha_pattern") or {}).items():
            plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
            matching = [layer for layer, name in names.items() if name == plain or name.endswith(f".{plain}")]
            if not matching:
                raise ModelError(f"its alpha_pattern {pattern!r:.80} names no layer", where=path)
            alphas |= dict.fromkeys(matching, float(value))
        if settings.get(f"{part}.use_rslora"):  # scale alpha / sqrt(rank)
            alphas |= {layer: alphas[layer] * math.sqrt(ranks[layer]) for layer in names}
    return alphas


def _with_peft_config(header: Header, path: Path) -> Header:
    """The header with the settings that PEFT keeps beside its file, where the file itself has none."""
    config = path.parent / PEFT_CONFIG
    if METADATA in header.metadata or path.name != PEFT_FILE or not config.is_file():
        return header
    settings = {f"unet.{name}": value for name, value in read_json(config).items()}
    return dataclasses.replace(header, metadata={**header.metadata, METADATA: json.dumps(settings)})


def _check_manifest(path: Path, digest: str) -> None:
    if read_manifest(path.parent).get(path.name, {"sha256": digest})["sha256"] != digest:
        raise ModelError("does not match the manifest's sha256", where=path, hint="get the file again")


def _short_hash(path: Path) -> str:
    with path.open("rb") as handle:
        handle.seek(read_header(path).size)
        return hashlib.file_digest(handle, "sha256").hexdigest()[:12]
