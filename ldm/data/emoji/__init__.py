"""Scenes drawn from the Noto Color Emoji font, with captions: the data that the default model is trained on."""

from ldm.data.emoji.captions import vocabulary
from ldm.data.emoji.colours import COLOURS, nearest_colour
from ldm.data.emoji.holdout import canonical, held_out
from ldm.data.emoji.imagefolder import MIXED, export
from ldm.data.emoji.scenes import Card, Placed, Scene, SceneConfig, Scenes, Spec, render
from ldm.data.emoji.sprites import find_font, scaled, sprite
from ldm.data.emoji.table import EmojiObject, class_of, common, everyday, find, lookalikes, objects

EVERYDAY: tuple[str, ...] = tuple(thing.word for thing in everyday())  # the 150 words that people type first

__all__ = ["COLOURS", "EVERYDAY", "MIXED", "Card", "EmojiObject", "Placed", "Scene", "SceneConfig", "Scenes", "Spec"]
__all__ += ["canonical", "class_of", "common", "everyday", "export", "find", "find_font", "held_out", "lookalikes"]
__all__ += ["nearest_colour", "objects", "render", "scaled", "sprite", "vocabulary"]
