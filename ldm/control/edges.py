"""Lines of an image, white on black: Canny's edges, soft edges, and the lines of a drawing.

Shapes:  H, W image size
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

LOW, HIGH = 100, 200  # of gradients: those that most ControlNets for Canny edges are used with
TAN_22, TAN_67 = 0.41421356, 2.41421356  # of 22.5° and 67.5°, where the direction of an edge changes its name


def edges(image: Image.Image, low: int = LOW, high: int = HIGH) -> Image.Image:
    """Canny 1986 as OpenCV has it: Sobel's gradients of the strongest channel, |x| + |y|, lines one pixel wide.

    Gradients above `high` are edges, those above `low` are where they touch one.
    """
    right, down = _strongest(*_sobel(np.asarray(image, np.int32)))
    strength = np.abs(right) + np.abs(down)
    thin = _ridges(strength, right, down) & (strength > low)
    return _white_where(_connected(thin & (strength > high), thin))


def soft_edges(image: Image.Image) -> Image.Image:
    """The gradient's size after a small blur, brightest where 99 of 100 are weaker: lines with a soft border."""
    right, down = _sobel(_grey(image.filter(ImageFilter.GaussianBlur(max(image.size) / 512))))
    strength = np.hypot(right, down)
    most = max(float(np.percentile(strength, 99)), 64.0)
    return _rgb(np.clip(strength / most, 0, 1) ** 0.75 * 255)


def lineart(image: Image.Image) -> Image.Image:
    """What is darker than its surroundings in every channel: the ink of a drawing, white on black."""
    around = np.asarray(image.filter(ImageFilter.GaussianBlur(6 * max(image.size) / 512)), np.float64)
    ink = (around - np.asarray(image, np.float64)).min(axis=2).clip(0)
    clear = ink[ink > 8]
    return _rgb(np.clip(ink / max(16.0, float(np.median(clear)) if clear.size else 16.0) * 127, 0, 255))


def _strongest(right: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (H, W, 3) -> (H, W), each pixel's of the channel where it is largest."""
    channel = (np.abs(right) + np.abs(down)).argmax(axis=2)[..., None]
    right, down = (np.take_along_axis(one, channel, axis=2)[..., 0] for one in (right, down))
    return right, down


def _grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), np.int32)  # (H, W)


def _sobel(levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(to the right, downwards) of levels (H, W) or (H, W, 3); the outermost pixels are repeated."""
    p = np.pad(levels, ((1, 1), (1, 1), (0, 0))[: levels.ndim], mode="edge")
    smooth = p[:-2] + 2 * p[1:-1] + p[2:]  # (H, W + 2)
    wide = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]  # (H + 2, W)
    return smooth[:, 2:] - smooth[:, :-2], wide[2:] - wide[:-2]


def _ridges(strength: np.ndarray, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where no neighbour across the edge is stronger (H, W) bool; of two equal ones the second is left out."""
    p = np.pad(strength, 1)

    def beside(dy: int, dx: int) -> np.ndarray:
        return p[1 + dy : 1 + dy + strength.shape[0], 1 + dx : 1 + dx + strength.shape[1]]

    flat, steep = np.abs(down) < TAN_22 * np.abs(right), np.abs(down) > TAN_67 * np.abs(right)
    same_sign = (right < 0) == (down < 0)
    across = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    along = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    falling = (strength > beside(-1, -1)) & (strength > beside(1, 1))
    rising = (strength > beside(-1, 1)) & (strength > beside(1, -1))
    return np.where(flat, across, np.where(steep, along, np.where(same_sign, falling, rising)))


def _connected(sure: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """`sure` and what of `possible` touches it, over any number of pixels (H, W) bool."""
    width = possible.shape[1] + 2
    left = np.pad(possible & ~sure, 1).ravel()  # not reached yet
    front = np.flatnonzero(np.pad(sure, 1))
    around = np.array([-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1])
    found = np.pad(sure, 1).ravel()
    while front.size:
        near = np.unique((front[:, None] + around).ravel())
        front = near[left[near]]
        left[front], found[front] = False, True
    return found.reshape(-1, width)[1:-1, 1:-1]


def _white_where(mask: np.ndarray) -> Image.Image:
    return _rgb(mask * 255)


def _rgb(grey: np.ndarray) -> Image.Image:
    return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
