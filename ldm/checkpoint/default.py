"""Where the shipped model and the shipped settings are: beside `ldm/` in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import ModelError

PACKAGE = Path(__file__).resolve().parents[1]  # …/ldm, through the links of an editable install too


def shipped(name: str) -> Path:
    """The folder `weights`, `configs` or `docs/prompts`: the wheel's copy `ldm/_<name>`, else the checkout's.

    The path is returned whether it exists or not.
    """
    packaged = PACKAGE / f"_{name.rpartition('/')[2]}"
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def default_folder() -> Path:
    """The default model's folder. Raises ModelError where this installation has none."""
    folder = shipped("weights") / "default"
    if not folder.is_dir():
        raise ModelError(
            "the default model is not there", where=folder, hint="install the package again, or name a model folder"
        )
    return folder
