"""A model on the Hugging Face hub, by `owner/name` or `owner/name@revision`: its safetensors, JSON and text files.

What a name means is looked up once a process and then stays: the commit. No other kind of file is ever fetched.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ldm.checkpoint.safety import PICKLES, read_json
from ldm.errors import LdmError, ModelError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
STEMS |= {"text_encoder": "model", "text_encoder_2": "model"}
SETTINGS = ["model_index.json", "config.json", "manifest.json", "README.md"]
SETTINGS += [
    f"{part}/*{suffix}" for part in (*STEMS, "tokenizer", "tokenizer_2", "scheduler") for suffix in (".json", ".txt")
]
SETTINGS += ["tokenizer/spiece.model"]
WEIGHTS = ["diffusion_pytorch_model*.safetensors", *(f"{part}/{stem}*.safetensors" for part, stem in STEMS.items())]
HALF = ["*.fp16.*", "*.fp16-*"]  # fetched only where a repository has nothing else
NEVER = ["*non_ema*", "*flax*", "*openvino*"]
_commits: dict[tuple[str, str, str], str] = {}  # (cache folder, endpoint, name) -> commit


def is_hub_id(name: str) -> bool:
    """Whether this can only mean a repository: `owner/name`, no such path here, not even a folder `owner`."""
    if Path(name).suffix.lower() in (*PICKLES, ".safetensors"):
        return False
    return bool(ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


def snapshot(name: str, weights: bool = True) -> Path:
    """The local folder of a repository's files, downloaded where needed; its name is the commit.

    `weights=False` gets the settings alone. Raises ModelError that names repository, file and cache folder where one
    cannot be had.
    """
    from huggingface_hub import constants

    repo, _, revision = name.partition("@")
    place = (constants.HF_HUB_CACHE, constants.ENDPOINT, name)
    revision = _commits.get(place) or revision or None
    wanted = [*SETTINGS, *WEIGHTS] if weights else SETTINGS
    folder = _download(repo, revision, wanted, [*HALF, *NEVER])
    _commits[place] = folder.name
    if weights and missing_weights(folder):
        folder = _download(repo, folder.name, wanted, NEVER)
    if weights and (missing := missing_weights(folder)):
        what = f"the repository {repo} has no {missing} (pickles are never fetched), or it is not in the cache"
        raise ModelError(f"{what} {constants.HF_HUB_CACHE}", where=name, todo="choose a repository with safetensors")
    return folder


def forget() -> None:
    """Look up anew what every name means."""
    _commits.clear()


def _download(repo: str, revision: str | None, allow: list[str], ignore: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=allow, ignore_patterns=ignore, local_files_only=offline
        )
    except Exception as error:  # the library has many: no network, no such repository, gated, a full disk
        reason, todo = _reason(error, repo, revision)
        reason = "offline" if offline else reason
        file = _absent(repo, revision)
        raise ModelError(
            f"{file} of the repository {repo} is neither in the cache {constants.HF_HUB_CACHE}"
            f" nor could it be downloaded ({reason})",
            where=repo if revision is None else f"{repo}@{revision}",
            todo=todo,
        ) from None
    return Path(folder)


def _reason(error: Exception, repo: str, revision: str | None) -> tuple[str, str]:
    """Why a download failed and what to do, by the name of the library's error: its modules move between versions."""
    known = {
        "GatedRepoError": (
            "access must be asked for",
            f"open its page, then `hf auth login`, then `hf download {repo}`",
        ),
        "RepositoryNotFoundError": ("no such repository, or it is private", "check the name; no folder has it either"),
        "RevisionNotFoundError": (f"it has no revision {revision!r}", "check the name after the @"),
    }
    names = [kind.__name__ for kind in type(error).__mro__]
    todo = f"connect and try again, or run `hf download {repo}` on a machine that is, and copy the cache"
    return next((known[name] for name in names if name in known), (names[0], todo))


def _absent(repo: str, revision: str | None) -> str:
    """The first file of a model that the cache does not hold."""
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
    missing = missing_weights(Path(index).parent) if isinstance(index, str) else None
    return missing or "model_index.json"


def missing_weights(folder: Path) -> str | None:
    """The first weight file (as a path in the folder) that model_index.json asks for and that is not there."""
    try:
        index = read_json(folder / "model_index.json")
    except LdmError:  # an autoencoder alone, or no model: said by whoever reads the folder
        return None
    parts = [part for part in STEMS if part in index and index[part] not in (None, [None, None])]
    lacking = (part for part in parts if not list((folder / part).glob(f"{STEMS[part]}*.safetensors")))
    return next((f"{part}/{STEMS[part]}.safetensors" for part in lacking), None)
