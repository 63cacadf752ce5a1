"""A model on the Hugging Face hub, by `owner/name` or `owner/name@revision`: its safetensors, JSON and text files.

The commit that a name means is looked up once per process and then kept. No other kind of file is ever fetched.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ldm.checkpoint.folder import CARD, CLASSES, INDEX, STEMS
from ldm.checkpoint.safety import MANIFEST, read_json
from ldm.console import progress
from ldm.errors import LdmError, ModelError

SETTINGS = [INDEX, "config.json", MANIFEST, CARD]
SETTINGS += [f"{part}/*{suffix}" for part in CLASSES for suffix in (".json", ".txt")]
WEIGHTS = ["diffusion_pytorch_model*.safetensors", *(f"{part}/{stem}*.safetensors" for part, stem in STEMS.items())]
HALF = ["*.fp16.*", "*.fp16-*"]  # fetched only where a repository has nothing else
NEVER = ["*non_ema*", "*flax*", "*openvino*"]
_commits: dict[tuple[str, str, str], str] = {}  # (cache folder, endpoint, name) -> commit


def snapshot(name: str, weights: bool = True) -> Path:
    """The local folder of a repository's files, downloaded where needed; its name is the commit.

    `weights=False` gets the settings alone. Raises ModelError that names the repository, the missing file and the
    cache folder.
    """
    patterns = [*SETTINGS, *WEIGHTS] if weights else SETTINGS
    folder = fetch(name, patterns)
    if weights and missing_weights(folder):
        folder = fetch(name, patterns, half=True)
    if weights and (file := missing_weights(folder)):
        raise no_weights(name, file)
    return folder


def fetch(name: str, patterns: Sequence[str], half: bool = False, first: str = INDEX) -> Path:
    """The local folder of a repository's files with these names (`*` matches `/` too); its name is the commit.

    With `half` files in half precision come too. `first` is the file that an error names. Raises ModelError.
    """
    from huggingface_hub import constants

    repo, _, revision = name.partition("@")
    key = (constants.HF_HUB_CACHE, constants.ENDPOINT, name)
    folder = _download(repo, _commits.get(key) or revision or None, patterns, NEVER if half else [*HALF, *NEVER], first)
    _commits[key] = folder.name
    return folder


def no_weights(name: str, file: str) -> ModelError:
    """The error for a repository without this weight file."""
    from huggingface_hub import constants

    what = f"the repository has no {file}, and pickles are never fetched (cache: {constants.HF_HUB_CACHE})"
    return ModelError(what, where=name, hint="choose a repository with safetensors")


def forget() -> None:
    """Look up every name again the next time."""
    _commits.clear()


def _download(repo: str, revision: str | None, allow: Sequence[str], ignore: Sequence[str], first: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = progress(total=0).disable and not are_progress_bars_disabled()  # hide its bars where ours are hidden
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if quiet:
        disable_progress_bars()
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(allow), ignore_patterns=list(ignore), local_files_only=offline
        )
    except Exception as error:  # the library has many: no network, no such repository, gated, a full disk
        reason, hint = _reason(error, repo)
        absent, reason = _absent(repo, revision, first), "offline" if offline else reason
        raise ModelError(
            f"no such folder here, and {absent} of the repository {repo} is neither in the cache"
            f" {constants.HF_HUB_CACHE} nor could it be downloaded ({reason})",
            where=repo if revision is None else f"{repo}@{revision}",
            hint=hint,
        ) from None
    finally:
        if quiet:
            enable_progress_bars()
    return Path(folder)


def _reason(error: Exception, repo: str) -> tuple[str, str]:
    """Why a download failed, and a hint; by the name of the library's error, because its modules move."""
    known = {
        "GatedRepoError": ("access is given on request", f"ask for it on the page of {repo}, then `hf auth login`"),
        "RepositoryNotFoundError": ("there is none of this name, or it is private", "check the name"),
        "RevisionNotFoundError": ("it has no such revision", "check what follows the @"),
    }
    names = [kind.__name__ for kind in type(error).__mro__]
    hint = f"connect and try again, or run `hf download {repo}` on a machine that is, and copy the cache"
    return next((known[name] for name in names if name in known), (names[0], hint))


def _absent(repo: str, revision: str | None, first: str) -> str:
    """The first file of a model that the cache does not hold; of a part `first`."""
    from huggingface_hub import try_to_load_from_cache

    if first != INDEX:
        return first

    index = try_to_load_from_cache(repo, INDEX, revision=revision)
    missing = missing_weights(Path(index).parent) if isinstance(index, str) else None
    return missing or INDEX


def missing_weights(folder: Path) -> str | None:
    """The first weight file (as a path in the folder) that model_index.json asks for and that is not there."""
    try:
        index = read_json(folder / INDEX)
    except LdmError:  # an autoencoder alone, or no model: reported when the folder is read
        return None
    parts = [part for part in STEMS if index.get(part) not in (None, [None, None])]
    missing = (part for part in parts if not any((folder / part).glob(f"{STEMS[part]}*.safetensors")))
    return next((f"{part}/{STEMS[part]}.safetensors" for part in missing), None)
