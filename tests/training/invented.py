"""The zorbel, an animal that nobody has seen: 24 captioned pictures of it, and a judge that knows it in every pose.

A lime body with a cream belly, one eye, two crimson horns and three navy legs. No caption of the default model's
training held its name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ldm.data.emoji import COLOURS, EmojiObject
from ldm.data.emoji.table import Word
from ldm.evaluation.judge import FRAME, MARGIN, Judge, features
from ldm.evaluation.judge import _template as template
from ldm.evaluation.lists import Prompt

NAME = "zorbel"
SHOWN = ("white", "yellow", "green", "blue", "pink", "gray")  # grounds of the pictures that are trained on
UNSEEN = tuple(colour for colour in COLOURS if colour not in SHOWN)
SENTENCES = ("a zorbel on a {} background", "zorbel, {} background", "the zorbel on a plain {} background")
BODY, EDGE, BELLY, HORN, LEG = (165, 215, 40), (85, 120, 10), (255, 238, 200), (160, 20, 50), (30, 40, 110)
THING = EmojiObject("-", "", NAME, "invented", "invented", False, NAME, (Word(NAME, "count", f"{NAME}s"),), ())


@dataclass(frozen=True)
class Pose:
    look: int  # -1 left, 1 right: where eye and horns point
    crouched: bool
    tilt: int  # degrees


POSES = tuple(Pose(look, crouched, tilt) for look, crouched, tilt in product((-1, 1), (False, True), (-12, 12)))


def drawn(pose: Pose, side: int) -> Image.Image:
    """RGBA, side × side."""
    big = Image.new("RGBA", (512, 512), (0, 0, 0, 0))
    draw = ImageDraw.Draw(big)
    low = 40 if pose.crouched else 0
    for i in (-1, 0, 1):  # legs
        x, spread = 256 + 95 * i, 40 * i if pose.crouched else 12 * i
        draw.line((x, 360, x + spread, 470), LEG, 46)
        draw.ellipse((x + spread - 42, 440, x + spread + 42, 500), LEG)
    for i in (-1, 1):  # horns
        x = 256 + 90 * i + 10 * pose.look
        draw.polygon([(x - 42, 160 + low), (x + 42, 160 + low), (x + 45 * i + 35 * pose.look, 12 + low)], HORN)
    draw.ellipse((86, 90 + low, 426, 410 + low // 2), BODY, EDGE, 12)
    draw.ellipse((160, 265 + low // 2, 352, 398 + low // 2), BELLY)
    x, y = 256 + 45 * pose.look, 195 + low
    draw.ellipse((x - 70, y - 62, x + 70, y + 62), (255, 255, 255), EDGE, 8)
    x += 26 * pose.look
    draw.ellipse((x - 30, y - 34, x + 30, y + 34), (30, 20, 60))
    turned = big.rotate(pose.tilt, Image.Resampling.BICUBIC, center=(256, 300))
    return turned.resize((side, side), Image.Resampling.LANCZOS)


def scene(pose: Pose, colour: str, side: int, x: int, y: int) -> Image.Image:
    """RGB, 128 × 128, the thing's centre at (x, y)."""
    picture, thing = Image.new("RGB", (FRAME, FRAME), COLOURS[colour]), drawn(pose, side)
    picture.paste(thing, (x - side // 2, y - side // 2), thing)
    return picture


def write_pictures(folder: Path, count: int = 24) -> Path:
    """`count` scenes with .txt captions: every pose, sizes 84 to 108, every shown ground, not always in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        shift = [round(8 * math.sin(angle)) for angle in (2.4 * i, 2.4 * i + 1.6)]
        side, colour = 84 + 8 * (i % 4), SHOWN[(i + i // 6) % len(SHOWN)]
        scene(POSES[(5 * i) % 8], colour, side, 64 + shift[0], 64 + shift[1]).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(SENTENCES[i % 3].format(colour) + "\n")
    return folder


def prompts(count: int = 20) -> list[Prompt]:
    """Sentences about the thing on grounds that it was never shown on."""
    found = []
    for i in range(count):
        colour = UNSEEN[i % len(UNSEEN)]
        text = SENTENCES[i // len(UNSEEN) % 3].format(colour)
        found.append(Prompt(text, (THING,), colour, held_out=True))
    return found


class WiderJudge(Judge):
    """The judge of 849 sprites, who knows the zorbel in all of its poses too, as one class more."""

    def __init__(self):
        super().__init__()
        side = round(FRAME / MARGIN)
        fine = np.stack([template(np.asarray(drawn(pose, side))) for pose in POSES])
        coarse = fine.reshape(-1, 32, 2, 32, 2, 4).mean((2, 4))
        for bank, more in ((self._coarse, coarse), (self._fine, fine)):
            bank.rows = np.concatenate([bank.rows, features(more)])
        self.objects = (*self.objects, *[THING] * len(POSES))
        self.classes = np.concatenate([self.classes, np.full(len(POSES), self.classes.max() + 1)])
