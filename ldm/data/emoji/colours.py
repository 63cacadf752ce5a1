"""The twelve named colours of backgrounds and cards."""

from __future__ import annotations

COLOURS: dict[str, tuple[int, int, int]] = {  # sRGB, 0..255
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (214, 48, 49),
    "green": (60, 160, 75),
    "blue": (52, 101, 200),
    "yellow": (250, 210, 60),
    "orange": (240, 140, 40),
    "purple": (130, 70, 180),
    "pink": (250, 170, 200),
    "gray": (140, 140, 140),
    "brown": (120, 80, 50),
    "teal": (40, 160, 160),
}


def nearest_colour(rgb: tuple[int, int, int]) -> str:
    """The name of the colour with the smallest squared distance in RGB."""
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], rgb)))
