"""The sheet and the plot of the bench of samplers: all images of one prompt, and the distances."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from ldm.bench.comparison import Comparison
from ldm.diffusion.names import SAMPLER_NAMES
from ldm.report import log_panels

SIDE, GAP, LABELS, HEAD, GROUP = 128, 6, 170, 64, 30  # px; SIDE is the longer side of an image
INK, FAINT, PAPER, EMPTY = (30, 30, 30), (110, 110, 110), (255, 255, 255), (242, 242, 242)
GROUPS = {False: "Add no noise: all converge to the reference", True: "Add noise: each converges to another image"}
NOTE_WIDTH = 140  # letters


def sheet(comparison: Comparison) -> Image.Image:
    """Images of one prompt and seed: a row for each sampler, a column for each number of steps, then the reference."""
    steps = sorted({row.steps for row in comparison.rows})
    width, height = (round(side * SIDE / max(comparison.reference.size)) for side in comparison.reference.size)
    groups = {
        noisy: list(dict.fromkeys(r.sampler for r in comparison.rows if r.adds_noise == noisy)) for noisy in GROUPS
    }
    tall = HEAD + sum((GROUP + len(names) * (height + GAP)) for names in groups.values() if names)
    paper = Image.new("RGB", (LABELS + (len(steps) + 1) * (width + GAP), tall), PAPER)
    pen, large, small = ImageDraw.Draw(paper), ImageFont.load_default(15), ImageFont.load_default(12)
    settings = comparison.settings
    title = f"“{settings['prompt']}”, seed {settings['seed']}, guidance {settings['guidance_scale']:g}"
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
            for line, (text, fill, font) in enumerate(_labels(comparison, name, large, small)):
                pen.text((GAP, y + height / 2 - 24 + 19 * line), text, fill=fill, font=font)
            shown = [comparison.images.get((name, n)) for n in steps] + ([] if noisy else [comparison.reference])
            for x, image in zip(left, shown):
                if image is None:
                    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=EMPTY)
                    pen.text((x + width / 2, y + height / 2), "not possible", fill=FAINT, font=small, anchor="mm")
                else:
                    paper.paste(image.resize((width, height)), (x, y))
            y += height + GAP
    return paper


def _labels(comparison: Comparison, name: str, large, small) -> list[tuple]:
    """The labels of a row: our name, A1111's name, and the cost of a step where it is not one evaluation."""
    last = max((row for row in comparison.rows if row.sampler == name), key=lambda row: row.steps)
    lines = [(name, INK, large), (SAMPLER_NAMES[name][0], FAINT, small)]
    if last.evaluations > last.steps:
        lines.append(("two evaluations a step", FAINT, small))
    return lines


def plot(comparison: Comparison) -> str:
    """An SVG of the distances by steps and by evaluations of the network, worst sampler first."""
    measured = [row for row in comparison.rows if row.distance is not None]
    last = {row.sampler: row.distance for row in sorted(measured, key=lambda row: row.steps)}
    names = sorted(last, key=last.get, reverse=True)
    axes = {"steps": "steps", "evaluations of the network": "evaluations"}
    panels = {
        title: {name: [(getattr(r, field), r.distance) for r in measured if r.sampler == name] for name in names}
        for title, field in axes.items()
    }
    settings = comparison.settings
    notes = [
        f"Mean of {settings['images']} images (one for each prompt and seed), guidance {settings['guidance_scale']:g}, "
        f"against {settings['reference']}, which is itself uncertain by about {comparison.reference_error:.2f}."
    ]
    left_out = list(dict.fromkeys(row.sampler for row in comparison.rows if row.adds_noise))
    if left_out:
        reason = "they add noise, other noise with other steps, so that a seed has no image to which they converge."
        notes.append(f"Not drawn: {', '.join(left_out)}: {reason}")
    lines = [line for note in notes for line in textwrap.wrap(note, NOTE_WIDTH)]
    return log_panels(panels, "distance: RMS over pixels, levels of 255", lines)
