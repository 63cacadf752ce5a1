"""How closely images follow the contours of the scenes whose condition a ControlNet saw.

Shapes:  H, W image size
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.control import condition_of
from ldm.evaluation.judge import FRAME, SAME, background_of, to_array

FOLLOWED = 0.8  # intersection over union from which on a contour counts as followed


def conditions_of(kind: str, scenes: Sequence[np.ndarray]) -> list[Image.Image]:
    """What a ControlNet sees of scenes uint8 (H, W, 3). Raises ConfigError for an unknown kind."""
    return [condition_of(kind, Image.fromarray(scene)) for scene in scenes]


def object_mask(image: Image.Image | np.ndarray) -> np.ndarray:
    """Where an image shows no background, with what that encloses: bool (128, 128)."""
    pixels = to_array(image)
    far = np.linalg.norm(pixels.astype(np.float32) - background_of(pixels).rgb, axis=2) > SAME
    walls = Image.fromarray(np.pad(far, 1).astype(np.uint8) * 255).copy()  # else it cannot be written into
    ImageDraw.floodfill(walls, (0, 0), 128)  # the background, from the border on
    return np.asarray(walls)[1 : FRAME + 1, 1 : FRAME + 1] != 128


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks, 1 where both are empty."""
    union = (one | other).sum()
    return float((one & other).sum() / union) if union else 1.0


def contours(images: Sequence[Image.Image | np.ndarray], scenes: Sequence[np.ndarray]) -> dict[str, Any]:
    """The overlap of each image's object with that of its scene: its mean, 5 % and 50 %, how many are followed.

    `others` is the mean overlap with the next scene, which an image is not to follow.
    """
    drawn, true = [object_mask(image) for image in images], [object_mask(scene) for scene in scenes]
    each = [overlap(a, b) for a, b in zip(drawn, true, strict=True)]
    others = [overlap(a, b) for a, b in zip(drawn, [*true[1:], *true[:1]])]
    found: dict[str, Any] = {"n": len(each), "followed": sum(value >= FOLLOWED for value in each)}
    found |= {"mean": round(float(np.mean(each)), 4), "others": round(float(np.mean(others)), 4)}
    found |= {f"p{q:02d}": round(float(np.percentile(each, q)), 4) for q in (5, 50)}
    return {**found, "each": [round(value, 4) for value in each]}


def line(found: dict[str, Any]) -> str:
    """The same as text."""
    followed = f"{found['followed']}/{found['n']} followed (overlap {FOLLOWED:g} or more)"
    values = f"mean {found['mean']:.2f}, median {found['p50']:.2f}, 5 % {found['p05']:.2f}"
    return f"contours: {followed}; {values}; of another scene {found['others']:.2f}"
