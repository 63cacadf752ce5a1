"""Verdicts on images compared with their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from ldm import console
from ldm.errors import ConfigError
from ldm.evaluation.arrangements import Arrangement, judge_arrangement
from ldm.evaluation.judge import Verdict, shared_judge, to_array
from ldm.evaluation.lists import Prompt

FIVE = 5  # "first five": the right class is among so many guesses


@dataclass(frozen=True)
class Judged:
    """The judge's verdict on one image, compared with its prompt."""

    prompt: Prompt
    guess: str  # the first guess of each object, in words
    first: bool  # all objects are the first guess, in the right place, number and card
    five: bool  # the same, the objects being among the first five guesses
    background: str  # colour
    background_right: bool | None  # None where the prompt names none
    match: float  # [0, 1]: near 1 on a drawn scene, near 0 on noise
    objects: bool  # the objects are the first guess, whatever their number and cards

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values, the prompt's beside them."""
        prompt = self.prompt
        expected = {"objects": [o.codepoints for o in prompt.objects], "colour": prompt.colour, "kind": prompt.kind}
        values = {key: value for key, value in asdict(self).items() if key != "prompt"}
        return {"prompt": prompt.text, **expected, "held_out": prompt.held_out, **values, "match": round(self.match, 4)}


def judge_images(
    images: Sequence[Image | np.ndarray], prompts: Sequence[Prompt], font: str | Path | None = None
) -> list[Judged]:
    """The verdict on each image (PIL, or uint8 (H, W, 3)) by the prompt at the same position. Raises ConfigError."""
    return judge_by(images, [prompts], font)[0]


def judge_by(images: Sequence, lists: Sequence[Sequence[Prompt]], font: str | Path | None = None) -> list[list[Judged]]:
    """The verdicts on the same images by several lists of prompts; what does not depend on the prompt is done once."""
    for prompts in lists:
        if len(images) != len(prompts):
            raise ConfigError(f"{len(images)} images for {len(prompts)} prompts", where="prompts")
    judge, results = shared_judge(font), [[] for _ in lists]
    for i, image in enumerate(console.progress(images, desc="judging", unit="image")):
        pixels, verdict = to_array(image), None
        for judged, prompts in zip(results, lists):
            if prompts[i].family in ("single", "unknown"):
                verdict = verdict or judge(pixels)
                judged.append(_of_single(verdict, prompts[i]))
            else:
                judged.append(_of_arrangement(judge_arrangement(judge, pixels, prompts[i]), prompts[i]))
    return results


def _of_single(verdict: Verdict, prompt: Prompt) -> Judged:
    """For a prompt of one object; for one of unknown words only the background can be right."""
    rank = verdict.rank(prompt.objects[0]) if prompt.objects else FIVE
    background = verdict.background.colour
    guess, right = verdict.guesses[0].word, None if prompt.colour is None else background == prompt.colour
    return Judged(prompt, guess, rank == 0, rank < FIVE, background, right, verdict.match, rank == 0)


def _of_arrangement(arrangement: Arrangement, prompt: Prompt) -> Judged:
    words = [v.guesses[0].word for v in arrangement.verdicts]
    if prompt.family == "card":
        words = [f"{word} on {colour}" for word, colour in zip(words, arrangement.cards)]
    first, five = arrangement.matches_prompt(prompt), arrangement.matches_prompt(prompt, FIVE)
    objects = all(rank == 0 for rank in arrangement.ranks)
    background = arrangement.background.colour
    right = None if prompt.colour is None else background == prompt.colour
    return Judged(prompt, ", ".join(words), first, five, background, right, arrangement.match, objects)
