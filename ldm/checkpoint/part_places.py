"""Where a part of a model is: in a run, a model's folder, a folder of its own, or a repository of the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.checkpoint.folder import INDEX, TOKENIZER, default_folder, digest_of, is_hub_id, weight_files
from ldm.checkpoint.hub import fetch, no_weights
from ldm.checkpoint.safety import MANIFEST, check_manifest, refuse_pickle
from ldm.errors import ModelError
from ldm.files import sha256

WORDS = {"vae": "autoencoder", "text": "text encoder"}  # kind of part -> what messages call it
FOLDERS = {"vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}  # of a model's folder
MODEL = ("vae", "unet", "text_encoder")  # what a model's folder has at least one of
STEMS = ("diffusion_pytorch_model", "model", "open_clip_model", "open_clip_pytorch_model")
OPEN_CLIP = "open_clip_config.json"
SETTINGS = ("config.json", INDEX, MANIFEST, OPEN_CLIP, *TOKENIZER)


@dataclass(frozen=True)
class Place:
    """A part's folders (of a pair of text encoders two), or its single file."""

    name: str  # as the user gave it; a hub id with its commit
    root: Path  # the model's folder, or the part's own; the single file
    folders: tuple[Path, ...]  # () of a single file
    commit: str | None = None  # of a hub id

    @property
    def manifest(self) -> Mapping[str, Mapping[str, Any]]:
        """The manifest of the root, its sizes checked; {} without one. Raises ModelError."""
        return check_manifest(self.root) if self.folders else {}

    def fingerprint(self, files: Sequence[Path]) -> str:
        """One digest of what the part is: the commit, the manifest's sha256, or one over the part's files."""
        if self.commit:
            return self.commit
        if (self.root / MANIFEST).is_file():
            return sha256(self.root / MANIFEST)
        return digest_of({path.name if path == self.root else str(path): sha256(path) for path in files})


def find_place(name: str, kind: str, subfolder: str | None = None, weights: bool = True) -> Place:
    """The place of a part: `kind` is "vae" or "text", `subfolder` where in a folder or repository it is.

    `name` is "default", a run, a model's folder, the part's own folder, a single file or a hub id; of a hub id the
    part alone is fetched, without `weights` its settings alone. Raises ModelError.
    """
    if name == "default":
        return _inside(name, default_folder(), kind, subfolder)
    if is_hub_id(name):
        return _on_hub(name, kind, subfolder, weights)
    path = Path(os.path.expanduser(name))
    if path.is_file():
        refuse_pickle(path)
        return Place(name, path, ())
    return _inside(name, model_folder(path, kind, subfolder), kind, subfolder)


def model_folder(run: str | Path, kind: str | None = None, subfolder: str | None = None) -> Path:
    """The diffusers folder that `run` is or holds (`RUN/model`), or with `kind` the folder of a part alone.

    Raises ModelError where there is none.
    """
    for folder in (Path(run) / "model", Path(run)):
        alone = kind and ((folder / "config.json").is_file() or (folder / OPEN_CLIP).is_file())
        if alone or (subfolder and (folder / subfolder).is_dir()) or any((folder / part).is_dir() for part in MODEL):
            return folder
    what = f"holds no model and no {WORDS[kind]}" if kind else "holds no model"
    raise ModelError(what, where=run, hint="give a finished run of ldm train, or a diffusers folder")


def _inside(name: str, root: Path, kind: str, subfolder: str | None, commit: str | None = None) -> Place:
    """The place of the part in a folder that is there."""
    if subfolder:
        folder = root / subfolder
        if not folder.is_dir() or root.resolve() not in folder.resolve().parents:
            names = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())) or "none"
            raise ModelError(f"has no folder {subfolder!r}", where=name, hint=f"its folders: {names}")
        return Place(name, root, (folder,), commit)
    folders = tuple(root / part for part in FOLDERS[kind] if (root / part).is_dir())
    if not folders and ((root / "config.json").is_file() or (root / OPEN_CLIP).is_file()):
        folders, root = (root,), _root_of(root)
    if not folders:
        raise ModelError(f"holds no {WORDS[kind]}", where=name, hint=f"name its folder ({kind}_subfolder=…)")
    return Place(name, root, folders, commit)


def _root_of(folder: Path) -> Path:
    """The model's folder of a part's folder (MODEL/vae), or the folder itself."""
    whole = folder.name in (*FOLDERS["vae"], *FOLDERS["text"]) and (folder.parent / INDEX).is_file()
    return folder.parent if whole and not (folder / MANIFEST).is_file() else folder


def _on_hub(name: str, kind: str, subfolder: str | None, weights: bool) -> Place:
    """The place of a part in the local copy of a repository, of which nothing else is fetched."""
    folders = (subfolder,) if subfolder else FOLDERS[kind]
    beside = [folder.replace("text_encoder", "tokenizer") for folder in folders]
    asked = [*SETTINGS, *(f"{folder}/*{end}" for folder in (*folders, *beside) for end in (".json", ".txt"))]
    root = fetch(name, asked, first=f"{folders[0]}/config.json")
    commit, repository = root.name, name.partition("@")[0]
    pinned = f"{repository}@{commit}"
    place = _inside(pinned, root, kind, subfolder, commit)
    if weights:
        for folder in place.folders:
            _fetch_weights(pinned, root, folder)
    return place


def _fetch_weights(name: str, root: Path, folder: Path) -> None:
    """Fetch the weights of a folder of a repository, in half precision where it has nothing else."""
    inside = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    patterns = [f"{inside}{stem}*{end}" for stem in STEMS for end in (".safetensors", ".json")]
    for half in (False, True):
        fetch(name, patterns, half, first=f"{inside}model.safetensors")
        if any(path.suffix == ".safetensors" for path in folder.iterdir()):
            return
    raise no_weights(name, f"{inside}{STEMS[0] if folder.name == 'vae' else STEMS[1]}.safetensors")


def weights_of(folder: Path) -> list[Path]:
    """The weight files of a part's folder, whatever they are called: [file] or [index.json, shards…]."""
    for stem in STEMS:
        if any(folder.glob(f"{stem}*.safetensors*")):
            return weight_files(folder, stem)
    return weight_files(folder, "model")  # raises, and names a pickle
