"""Scenes drawn from the Noto Color Emoji font, with captions: the data that the default model is trained on."""

from .captions import vocabulary
from .colours import COLOURS, nearest_colour
from .holdout import canonical, held_out
from .imagefolder import MIXED, export
from .scenes import Card, Placed, Scene, SceneConfig, Scenes, Spec, render
from .sprites import find_font, scaled, sprite
from .table import EmojiObject, class_of, everyday, find, lookalikes, objects

EVERYDAY: tuple[str, ...] = tuple(thing.word for thing in everyday())  # the 150 words that people type first

__all__ = [
    "COLOURS",
    "EVERYDAY",
    "MIXED",
    "Card",
    "EmojiObject",
    "Placed",
    "Scene",
    "SceneConfig",
    "Scenes",
    "Spec",
    "canonical",
    "class_of",
    "everyday",
    "export",
    "find",
    "find_font",
    "held_out",
    "lookalikes",
    "nearest_colour",
    "objects",
    "render",
    "scaled",
    "sprite",
    "vocabulary",
]
