"""Text encoders of SD3 and FLUX that are not in the model's file: where they are, and which is which. No torch."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ldm.checkpoint.folder import INDEX, STEMS, T5, check_tokenizer, weight_files
from ldm.checkpoint.safety import Header, read_header, read_json, refuse_pickle
from ldm.checkpoint.single import leftovers
from ldm.checkpoint.single.flow_settings import for_flow, text_config
from ldm.checkpoint.single.names import Destination, flow_texts
from ldm.errors import ConfigError, ModelError

KEPT = ("text_model.", "text_projection.", "encoder.", "shared.")  # beginnings of CLIP's and T5's names
SMALL = 768  # the width of CLIP-L
TITLES = {"clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5xxl": "T5"}
TOKENIZER = "T5's tokenizer"
TOKENIZER_HINT = "the folder with its tokenizer.json, such as tokenizer_2 of FLUX or tokenizer_3 of SD3"


class Extra(NamedTuple):
    """A weight file beside the model's own."""

    path: Path
    header: Header
    destinations: Mapping[str, Destination]  # by key in the file


@dataclass(frozen=True)
class Found:
    """A text encoder in a file or folder."""

    where: Path
    name: str  # clip_l, clip_g, t5xxl; "": one of CLIP's, its names do not say which
    config: Mapping[str, Any]
    files: tuple[tuple[Path, Header], ...]
    prefix: str = ""  # of its tensors' names
    tokenizer: Path | None = None


class Texts(NamedTuple):
    """All text encoders of a model."""

    configs: Mapping[str, Mapping[str, Any]]  # component -> config.json
    tokenizers: Mapping[str, Mapping[str, Any]]  # component -> the folder of its tokenizer, where there is one
    extras: tuple[Extra, ...]
    whole_clip: bool  # whether CLIP-L comes from a folder, with its own projection


def listed_texts(given: Any) -> tuple[Path, ...]:
    """The paths of `text_encoders=`: one, or several. Raises ModelError for what is not there, ConfigError."""
    listed = [] if given is None else [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str | os.PathLike) for one in listed):
        raise ConfigError(f"expected paths, got {given!r:.80}", where="text_encoders")
    for one in map(str, listed):
        if not os.path.exists(os.path.expanduser(one)):  # False for what cannot be a name
            raise ModelError("no such text encoder", where=one[:80], hint="name a file or a folder that is there")
    return tuple(Path(os.path.expanduser(one)) for one in listed)


def with_texts(configs: Mapping[str, Any], given: Sequence[Path], flux: bool) -> Texts:
    """The text encoders that `configs` (component -> config.json) has, and those of files and folders.

    What is given wins over what is in the file. Raises ModelError where it is not clear which encoder one is, and for
    one that the model has no place for.
    """
    encoders, tokenizers = [], []
    for path in given:
        (encoders if (found := find_texts(path)) else tokenizers).extend(found or [path])
    for folder in tokenizers:
        check_tokenizer(folder, t5=True)
    parts = {short: part for part, short in flow_texts(flux).items()}
    texts = {part: configs[part] for part in parts.values() if part in configs}
    folders = {}
    extras: list[Extra] = []
    named = _named(encoders, parts, texts)
    for one in named:
        part = parts[one.name]
        texts[part] = for_flow(one.config, one.name, flux)
        if one.tokenizer is not None:
            folders[part] = {"folder": str(one.tokenizer)}
        extras += [Extra(path, header, _destinations(one, header, part)) for path, header in one.files]
    if tokenizers:
        folders[parts["t5xxl"]] = {"folder": str(tokenizers[-1])}
    from_folder = any(one.name == "clip_l" and one.where.is_dir() for one in named)
    return Texts(dict(sorted(texts.items())), folders, tuple(extras), from_folder)


def _destinations(one: Found, header: Header, part: str) -> dict[str, Destination]:
    inside = (key for key in header.tensors if key.startswith(one.prefix))
    names = {key: key[len(one.prefix) :] for key in inside}
    whole = one.where.is_dir()  # a text encoder and nothing else
    return {key: Destination(part, (name,)) for key, name in names.items() if whole or name.startswith(KEPT)}


def _named(encoders: Sequence[Found], parts: Mapping[str, str], present: Container[str]) -> list[Found]:
    """The same encoders, each with its name: CLIP's that do not say theirs by their widths, CLIP-L's is the smaller.

    One alone is the one that the model's file lacks (`present` are the components that it has).
    """
    free = [short for short in parts if short != "t5xxl" and short not in {one.name for one in encoders}]
    unnamed = sorted((one for one in encoders if not one.name), key=lambda one: one.config["hidden_size"])
    if len(free) > len(unnamed) == 1:
        lacking = [short for short in free if parts[short] not in present]
        larger = unnamed[0].config["hidden_size"] > SMALL
        free = lacking if len(lacking) == 1 else free[larger:]
    if len(unnamed) > len(free) or any(one.name not in ("", *parts) for one in encoders):
        where = (unnamed or encoders)[-1].where
        hint = f"give one each of {', '.join(TITLES[short] for short in parts)}"
        raise ModelError("is a text encoder too many for this model", where=where, hint=hint)
    named = [replace(one, name=short) for one, short in zip(unnamed, free)]
    return [*(one for one in encoders if one.name), *named]


def find_texts(path: Path) -> list[Found]:
    """The text encoders at a path: a file, a model's folder, one part of it; [] for the folder of a tokenizer alone."""
    if path.is_file():
        return _in_file(path)
    if (path / INDEX).is_file():
        parts = [part for part in flow_texts(False) if (path / part / "config.json").is_file()]
        return [_in_folder(path / part) for part in parts]
    if (path / "config.json").is_file():
        return [_in_folder(path)]
    files = sorted(one for one in path.iterdir() if one.suffix == ".safetensors")
    if files:
        return [one for file in files for one in _in_file(file)]
    if (path / "tokenizer.json").is_file():
        return []
    raise ModelError("holds no text encoder and no tokenizer.json", where=path, hint=TOKENIZER_HINT)


def _in_folder(folder: Path) -> Found:
    config = read_json(folder / "config.json")
    t5 = config.get("model_type") == "t5" or (config.get("architectures") or [""])[0] in T5
    if not t5 and "hidden_size" not in config:
        raise ModelError("is no text encoder of CLIP or T5", where=folder / "config.json")
    files = [path for path in weight_files(folder, STEMS["text_encoder"]) if path.suffix == ".safetensors"]
    config = {**config, "model_type": "t5"} if t5 else config
    headers = tuple((path, read_header(path)) for path in files)
    return Found(folder, "t5xxl" if t5 else "", config, headers, "", _tokenizer_of(folder))


def _in_file(path: Path) -> list[Found]:
    """Of ComfyUI's single encoders, and of whole models in one file; names are transformers'."""
    refuse_pickle(path)
    header, found = read_header(path), []
    leftovers.check_quantised(tuple(header.tensors), path)
    for mark in ("text_model.embeddings.token_embedding.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"):
        for key in (key for key in header.tensors if key.endswith(mark)):
            prefix = key.removesuffix(mark)
            shapes = {k[len(prefix) :]: tensor.shape for k, tensor in header.tensors.items() if k.startswith(prefix)}
            if config := text_config(shapes, path):
                t5 = config.get("model_type") == "t5"
                name = "t5xxl" if t5 else next((one for one in ("clip_l", "clip_g") if one in prefix), "")
                tokenizer = _tokenizer_of(path.parent) if t5 else None
                found.append(Found(path, name, config, ((path, header),), prefix, tokenizer))
    if not found:
        what = "holds no text encoder that SD3 or FLUX reads (CLIP's or T5's, by transformers' names)"
        raise ModelError(what, where=path)
    return found


def _tokenizer_of(folder: Path) -> Path | None:
    """The folder of a text encoder's tokenizer: inside, or beside in a model's folder."""
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    for place in (folder, folder / "tokenizer", *([beside] if beside != folder else [])):
        if (place / "tokenizer.json").is_file() or (place / "vocab.json").is_file():
            return place
    return None


def absent_parts(configs: Mapping[str, Any], tokenizers: Mapping[str, Any], flux: bool, vae: bool) -> list[str]:
    """What a model lacks, by the names that people know; `vae`: whether there is one."""
    names = flow_texts(flux)
    missing = [] if vae else ["VAE"]
    missing += [TITLES[short] for part, short in names.items() if part not in configs and (flux or short != "t5xxl")]
    t5 = next(part for part, short in names.items() if short == "t5xxl")
    return missing + ([TOKENIZER] if t5 in configs and t5 not in tokenizers else [])


def hint_for(missing: Sequence[str]) -> str:
    """Where to give them."""
    hints = ["--vae FILE"] if "VAE" in missing else []
    texts = [name for name in missing if name not in ("VAE", TOKENIZER)]
    if texts:
        hints.append(f"--text-encoders FILE for {' and for '.join(texts)}")
    if TOKENIZER in missing or "T5" in missing:
        hints.append(f"--text-encoders FOLDER for {TOKENIZER} ({TOKENIZER_HINT})")
    return "give " + ", ".join(hints)
