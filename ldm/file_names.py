"""Names of files: from texts, not yet taken, or spelt in another Unicode form."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path


def spelt_alike(path: Path) -> Path:
    """`path`, or where there is none the one beside it whose name is the same text in another Unicode form.

    Macs write é as two characters, keyboards as one.
    """
    if path.name.isascii() or path.exists() or not path.parent.is_dir():
        return path
    name = unicodedata.normalize("NFC", path.name)
    return next((one for one in path.parent.iterdir() if unicodedata.normalize("NFC", one.name) == name), path)


def slug(text: str) -> str:
    """`[a-z0-9-]{1,60}` from any text, `image` when nothing is left."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "image"


def unused_path(folder: str | Path, stem: str, suffix: str) -> Path:
    """The first of stem.png, stem-2.png, stem-3.png … that does not exist in `folder`."""
    folder, number = Path(folder), 1
    path = folder / f"{stem}{suffix}"
    while os.path.lexists(path):
        number += 1
        path = folder / f"{stem}-{number}{suffix}"
    return path
