"""Write scenes as an imagefolder: numbered PNGs and `metadata.jsonl` with `file_name` and `text`."""

from __future__ import annotations

import json
from pathlib import Path

from ldm import files
from ldm.config import require
from ldm.console import progress
from ldm.data.emoji.scenes import SceneConfig, Scenes
from ldm.data.emoji.sprites import find_font
from ldm.errors import DataError

MIXED = {"single": 0.5, "pair": 0.2, "count": 0.15, "card": 0.15}
BYTES_EACH = 12_000  # of one scene as PNG, rounded up


def export(
    folder: str | Path, n: int = 1000, seed: int = 0, config: SceneConfig | None = None, font: str | Path | None = None
) -> Path:
    """Draw `n` scenes into `folder`, which appears only when it is complete; returns it.

    The default config draws all 849 objects in all kinds of scenes. Raises ConfigError for n < 1, DataError where the
    folder is not empty or the font is missing, ResourceError where the disk is full or cannot be written.
    """
    from PIL import Image

    from ldm.images import encode

    require(n >= 1, f"must be at least 1, got {n}", "n")
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError("is there already and not empty", where=target, hint="name a new folder with -o, or empty it")
    scenes = Scenes(config or SceneConfig(objects="all", kinds=MIXED), seed, find_font(font))
    files.require_space(target.parent, n * BYTES_EACH)
    digits = max(6, len(str(n - 1)))
    with files.atomic_folder(target) as unfinished:
        lines = []
        for index in progress(range(n), desc="scenes", unit="image"):
            scene, name = scenes[index], f"{index:0{digits}d}.png"
            (unfinished / name).write_bytes(encode(Image.fromarray(scene.image)))
            lines.append(json.dumps({"file_name": name, "text": scene.caption}, ensure_ascii=False) + "\n")
        (unfinished / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return target
