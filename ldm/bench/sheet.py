"""What the bench of samplers shows: a contact sheet of the pictures, and a plot of the distances."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ldm.diffusion.names import SAMPLER_NAMES
from ldm.report import log_panels

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.bench.samplers import Comparison

SIDE, GAP, LABELS, HEAD, GROUP = 128, 6, 170, 64, 30  # px; SIDE is what the longer side of a picture is shown with
INK, FAINT, PAPER, EMPTY = (30, 30, 30), (110, 110, 110), (255, 255, 255), (242, 242, 242)
GROUPS = {False: "Add no noise: all come nearer to the reference", True: "Add noise: each draws a picture of its own"}
NOTE_WIDTH = 140  # letters


def sheet(found: Comparison) -> Image:
    """Pictures of one prompt and seed: a row a sampler, a column a number of steps; the reference at the right."""
    from PIL import Image, ImageDraw, ImageFont

    steps = sorted({row.steps for row in found.rows})
    width, height = (round(side * SIDE / max(found.reference.size)) for side in found.reference.size)
    groups = {noisy: list(dict.fromkeys(r.sampler for r in found.rows if r.adds_noise == noisy)) for noisy in GROUPS}
    tall = HEAD + sum((GROUP + len(names) * (height + GAP)) for names in groups.values() if names)
    paper = Image.new("RGB", (LABELS + (len(steps) + 1) * (width + GAP), tall), PAPER)
    pen, large, small = ImageDraw.Draw(paper), ImageFont.load_default(15), ImageFont.load_default(12)
    told = found.settings
    title = f"“{told['prompt']}”, seed {told['seed']}, guidance {told['guidance_scale']:g}"
    pen.text((GAP, 8), title, fill=INK, font=large)
    heads = [*(f"{n} step{'s' * (n > 1)}" for n in steps), "reference"]
    left = [LABELS + column * (width + GAP) for column in range(len(heads))]
    for x, head in zip(left, heads):
        pen.text((x + width / 2, HEAD - 14), head, fill=INK, font=large, anchor="mm")
    y = HEAD
    for noisy, names in groups.items():
        if names:
            pen.text((GAP, y + 8), GROUPS[noisy], fill=FAINT, font=small)
            y += GROUP
        for name in names:
            for line, (text, fill, font) in enumerate(_labels(found, name, large, small)):
                pen.text((GAP, y + height / 2 - 24 + 19 * line), text, fill=fill, font=font)
            shown = [found.pictures.get((name, n)) for n in steps] + ([] if noisy else [found.reference])
            for x, picture in zip(left, shown):
                if picture is None:
                    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
                    pen.text((x + width / 2, y + height / 2), "not possible", fill=FAINT, font=small, anchor="mm")
                else:
                    paper.paste(picture.resize((width, height)), (x, y))
            y += height + GAP
    return paper


def _labels(found: Comparison, name: str, large, small) -> list[tuple]:
    """What stands before a row: our name, A1111's, and what a step costs where that is not one evaluation."""
    last = max((row for row in found.rows if row.sampler == name), key=lambda row: row.steps)
    lines = [(name, INK, large), (SAMPLER_NAMES[name][0], FAINT, small)]
    if last.evaluations > last.steps:
        lines.append(("two evaluations a step", FAINT, small))
    return lines


def plot(found: Comparison) -> str:
    """An SVG of the distances by steps and by evaluations of the network, worst sampler first."""
    measured = [row for row in found.rows if row.distance is not None]
    last = {row.sampler: row.distance for row in sorted(measured, key=lambda row: row.steps)}
    names = sorted(last, key=last.get, reverse=True)
    axes = {"steps": "steps", "evaluations of the network": "evaluations"}
    panels = {
        title: {name: [(getattr(r, field), r.distance) for r in measured if r.sampler == name] for name in names}
        for title, field in axes.items()
    }
    told = found.settings
    notes = [
        f"Mean of {told['pictures']} pictures (one a prompt and seed), guidance {told['guidance_scale']:g}, against "
        f"{told['reference']}, which is itself uncertain by about {found.reference_error:.2f}."
    ]
    left_out = list(dict.fromkeys(row.sampler for row in found.rows if row.adds_noise))
    if left_out:
        reason = "they add noise, other noise with other steps, so that a seed has no picture that they come nearer to."
        notes.append(f"Not drawn: {', '.join(left_out)}: {reason}")
    lines = [line for note in notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    return log_panels(panels, "distance: RMS over pixels, levels of 255", lines)
