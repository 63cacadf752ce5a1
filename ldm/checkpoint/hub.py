"""A model on the Hugging Face hub, by `owner/name` or `owner/name@revision`: its safetensors, JSON and text files."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ldm.checkpoint.safety import PICKLES
from ldm.errors import ModelError

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
SETTINGS = ["model_index.json", "config.json", "manifest.json", "README.md"]
SETTINGS += [f"{part}/*{suffix}" for part in PARTS for suffix in (".json", ".txt")]
WEIGHTS = [f"{part}/*.safetensors" for part in ("unet", "vae", "text_encoder")]
WEIGHTS += ["diffusion_pytorch_model*.safetensors"]
VARIANTS = ["*.fp16.*", "*non_ema*", "*flax*", "*openvino*"]


def is_hub_id(name: str) -> bool:
    """Whether this can only mean a repository: `owner/name`, no such path here, not even a folder `owner`."""
    if Path(name).suffix.lower() in (*PICKLES, ".safetensors"):
        return False
    return bool(ID.fullmatch(name)) and not Path(name).exists() and not Path(name).parent.exists()


def snapshot(name: str, weights: bool = True) -> Path:
    """The local folder of a repository's files, downloaded where needed; its name is the commit.

    `weights=False` gets the settings alone. Raises ModelError where it cannot be had, naming the cache folder.
    """
    from huggingface_hub import constants, snapshot_download

    repo, _, revision = name.partition("@")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        folder = snapshot_download(
            repo,
            revision=revision or None,
            allow_patterns=[*SETTINGS, *WEIGHTS] if weights else SETTINGS,
            ignore_patterns=VARIANTS,
            local_files_only=offline,
        )
    except Exception as error:  # the library has many: no network, no such repository, gated, offline
        reason = type(error).__name__
        raise ModelError(
            f"no such folder here, and the repository {repo} is neither in the cache {constants.HF_HUB_CACHE}"
            f" nor could it be downloaded ({'offline' if offline else reason})",
            where=name,
            todo=f"connect and try again, or run `hf download {repo}` on a machine that is, and copy the cache",
        ) from None
    return Path(folder)
