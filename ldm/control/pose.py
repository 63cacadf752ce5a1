"""Poses from OpenPose's keypoints, drawn as ControlNets for poses were trained on them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ldm.errors import ConfigError

POINTS = 18  # of COCO: nose, neck, right and left arm, right and left leg, eyes, ears
# Pairs of points in OpenPose's order; limb i has colour i
LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0))
LIMBS += ((0, 14), (14, 16), (0, 15), (15, 17))
COLOURS = ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0))
COLOURS += ((0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255))
COLOURS += ((170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85))
THICK, AREA = 4, 512 * 512  # pixels of a limb's half width and of a point's radius, in an image of so many pixels
DIM = 0.6  # of limbs
FRACTION = 2  # up to which numbers are fractions of the canvas; points outside it are a little above 1
SIDE = 512  # of the canvas where the file says none

Point = tuple[float, float]


def read_poses(path: str | Path) -> tuple[list[list[Point | None]], tuple[int, int]]:
    """(18 points of each person in 0 to 1, None for one that is not seen; the canvas' width and height).

    OpenPose's JSON: people with pose_keypoints_2d, [x, y, confidence] for each point in pixels, or in 0 to 1.
    Raises ConfigError.
    """
    try:
        found = json.loads(Path(os.path.expanduser(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot be read as JSON ({getattr(error, 'strerror', None) or error})", where=path) from None
    table = found[0] if isinstance(found, list) and found else found
    people = table.get("people") if isinstance(table, dict) else None
    if not isinstance(people, list) or not people:
        hint = '{"people": [{"pose_keypoints_2d": [x, y, confidence, …]}], "canvas_width": …, "canvas_height": …}'
        raise ConfigError("holds no people", where=path, hint=hint)
    size = tuple(table.get(name, SIDE) for name in ("canvas_width", "canvas_height"))
    if not all(isinstance(side, int) and 0 < side <= 8192 for side in size):
        raise ConfigError(f"the canvas of {size[0]!r:.20} x {size[1]!r:.20} cannot be", where=path)
    each = [_triples(person, path) for person in people]
    pixels = max(max(x, y) for person in each for x, y, _ in person) > FRACTION
    width, height = size if pixels else (1, 1)
    found = [[(x / width, y / height) if seen > 0 else None for x, y, seen in person] for person in each]
    return found, (size[0], size[1])


def _triples(person: Any, path: str | Path) -> list[tuple[float, float, float]]:
    """(x, y, confidence) of each point."""
    numbers = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
    good = isinstance(numbers, list) and len(numbers) == 3 * POINTS
    if not good or not all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers):
        raise ConfigError(f"pose_keypoints_2d is no list of {3 * POINTS} numbers (18 points of COCO)", where=path)
    return list(zip(numbers[::3], numbers[1::3], numbers[2::3]))


def draw_poses(people: list[list[Point | None]], size: tuple[int, int]) -> Image.Image:
    """Limbs, then points, on black."""
    image = Image.new("RGB", size)
    draw, thick = ImageDraw.Draw(image), max(1.0, THICK * math.sqrt(size[0] * size[1] / AREA))
    for person in people:
        at = [None if point is None else (point[0] * size[0], point[1] * size[1]) for point in person]
        for (a, b), colour in zip(LIMBS, COLOURS):
            start, end = at[a], at[b]
            if start is not None and end is not None:
                draw.polygon(_ellipse(start, end, thick), fill=tuple(int(DIM * c) for c in colour))
        for centre, colour in zip(at, COLOURS):
            if centre is not None:
                x, y = centre
                draw.ellipse((x - thick, y - thick, x + thick, y + thick), fill=colour)
    return image


def _ellipse(start: Point, end: Point, thick: float) -> list[Point]:
    """The outline of an ellipse from one point to another, as thick at its middle as twice `thick`."""
    (ax, ay), (bx, by) = start, end
    length, angle = math.hypot(bx - ax, by - ay) / 2, math.atan2(by - ay, bx - ax)
    turns = [2 * math.pi * i / 36 for i in range(36)]
    points = [(length * math.cos(turn), thick * math.sin(turn)) for turn in turns]
    across, down = math.cos(angle), math.sin(angle)
    return [((ax + bx) / 2 + u * across - v * down, (ay + by) / 2 + u * down + v * across) for u, v in points]
