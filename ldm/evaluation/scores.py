"""From pictures of prompts to scores: rendering, judging, the controls beside the score, and what is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldm import console
from ldm.data.emoji import Scene
from ldm.errors import ConfigError
from ldm.evaluation.arrangements import Found, look_at
from ldm.evaluation.judge import Verdict, shared_judge, to_array
from ldm.evaluation.lists import Prompt, open_list
from ldm.evaluation.real import real_pictures
from ldm.files import atomic_write, require_writable

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.checkpoint import Model
    from ldm.nn.vae import VAE

FIVE = 5  # "first five": the right class is among so many guesses
PIPELINE_ARGUMENTS = ("negative_prompt", "lora", "vae", "device", "dtype")  # the rest goes to `generate`

Renderer = Callable[[list[str], list[int]], Sequence["Image | np.ndarray"]]


@dataclass(frozen=True)
class Judged:
    """The judge's word on one picture of a prompt."""

    prompt: Prompt
    guess: str  # what it was taken for
    first: bool  # everything asked for is the first guess, in its place, number and card
    five: bool  # the same, the objects within the first five guesses
    ground: str  # colour
    ground_right: bool | None  # None where the prompt tells none
    match: float  # [0, 1]: near 1 on a drawn scene, near 0 on noise
    objects: bool  # the objects alone, whatever their number and cards

    def record(self) -> dict[str, Any]:
        """For JSON."""
        prompt = self.prompt
        expected = {"objects": [o.codepoints for o in prompt.objects], "colour": prompt.colour, "kind": prompt.kind}
        values = {key: value for key, value in asdict(self).items() if key != "prompt"}
        return {"prompt": prompt.text, **expected, "held_out": prompt.held_out, **values, "match": round(self.match, 4)}


def evaluate(
    model: str | Path | Model = "default",
    prompts: str | Path | Sequence = "everyday",
    out: str | Path | None = None,
    *,
    n: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    renderer: Renderer | None = None,
    controls: bool = True,
    font: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Render a list of prompts with a model, judge the pictures, print a table, and return the report.

    model       "default", a folder, a hub id or a loaded model
    prompts     a list's name ("everyday", "all", "everyday-30", "pairs-20", … see ldm.evaluation.LISTS), a file of that
                form, or a sequence of Prompt or (text, object[, colour])
    out         a folder for `scores.json` and the contact sheet `sheet.png`; None writes nothing
    n           only the first n prompts
    seed        picture i (from 1) is drawn with seed + i
    batch_size  pictures that are denoised together
    renderer    draws instead of a model: (texts, seeds) -> pictures
    controls    judge true scenes of the same prompts too, those against shuffled prompts, and those through the VAE
    font        the font's file, where it is not in a usual place
    settings    go to Pipeline and generate: num_inference_steps, guidance_scale, sampler, dtype, device, …

    The report holds `score`, `groups`, `real`, `shuffled`, `autoencoder` and `pictures` (one record each). Raises
    DataError for lists and the font, ConfigError and ModelError for settings and models before anything is drawn,
    ResourceError for `out`.
    """
    name, entries = open_list(prompts)
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ConfigError(f"must be a whole number from 1 up, got {n!r}", where="n")
    entries = entries[:n]
    if out is not None:
        require_writable(out)
    seeds = [seed + i for i in range(1, len(entries) + 1)]
    draw = renderer or pipeline_renderer(model, [e.text for e in entries], batch_size, settings)
    shared_judge(font)  # a missing font is told before anything is drawn
    pictures = list(draw([e.text for e in entries], seeds))
    judged = judge_pictures(pictures, entries, font=font)
    report = {"list": name, "model": str(getattr(model, "name", model)), "n": len(entries), "seed": seed}
    report |= {"settings": settings, "score": summary(judged), "groups": by_group(judged)}
    if controls:
        report |= control(entries, seeds, font, None if renderer else _vae(model, settings))
    report["pictures"] = [{"line": i, "seed": s, **j.record()} for i, (s, j) in enumerate(zip(seeds, judged), 1)]
    print(table(report), flush=True)
    if out is not None:
        _write(Path(out), report, pictures, judged)
    return report


def pipeline_renderer(model: Any, texts: list[str], batch_size: int | None, settings: dict[str, Any]) -> Renderer:
    """A renderer that draws one picture of each of `texts` with a Pipeline. Raises before any weight is read."""
    from ldm.pipeline import Pipeline

    own = {key: value for key, value in settings.items() if key in PIPELINE_ARGUMENTS}
    rest = {key: value for key, value in settings.items() if key not in own}
    pipeline = Pipeline(texts, model=model, **own)
    return lambda _, seeds: pipeline.generate(num_images=1, seed=seeds, batch_size=batch_size, **rest)


def judge_pictures(
    pictures: Sequence[Image | np.ndarray], prompts: Sequence[Prompt], font: str | Path | None = None
) -> list[Judged]:
    """The judge's word on each picture (PIL, or uint8 (H, W, 3)) by the prompt at the same position."""
    return judge_by(pictures, [prompts], font)[0]


def judge_by(
    pictures: Sequence, lists: Sequence[Sequence[Prompt]], font: str | Path | None = None
) -> list[list[Judged]]:
    """The same pictures by several lists of prompts; what does not depend on the prompt is looked at once."""
    for prompts in lists:
        if len(pictures) != len(prompts):
            raise ConfigError(f"{len(pictures)} pictures for {len(prompts)} prompts", where="prompts")
    see, found = shared_judge(font), [[] for _ in lists]
    for i, picture in enumerate(console.progress(pictures, desc="judging", unit="picture")):
        pixels, verdict = to_array(picture), None
        for judged, prompts in zip(found, lists):
            if prompts[i].family in ("single", "unknown"):
                verdict = verdict or see(pixels)
                judged.append(_of_single(verdict, prompts[i]))
            else:
                judged.append(_of_found(look_at(see, pixels, prompts[i]), prompts[i]))
    return found


def judge_scenes(
    pictures: Sequence[Image | np.ndarray], scenes: Sequence[Scene], font: str | Path | None = None
) -> dict[str, Any]:
    """The score of pictures drawn from the captions of these scenes: `first`, `five`, `ground`, … (see `summary`)."""
    return summary(judge_pictures(pictures, [Prompt.of(scene.spec) for scene in scenes], font))


def _of_single(verdict: Verdict, prompt: Prompt) -> Judged:
    """Of one object, or of none that is known: then nothing is right but the ground."""
    rank = verdict.rank(prompt.objects[0]) if prompt.objects else FIVE
    ground = verdict.ground.colour
    guess, right = verdict.guesses[0].word, None if prompt.colour is None else ground == prompt.colour
    return Judged(prompt, guess, rank == 0, rank < FIVE, ground, right, verdict.match, rank == 0)


def _of_found(found: Found, prompt: Prompt) -> Judged:
    words = [v.guesses[0].word for v in found.verdicts]
    if prompt.family == "card":
        words = [f"{word} on {colour}" for word, colour in zip(words, found.cards)]
    right = None if prompt.colour is None else found.ground.colour == prompt.colour
    first, five = found.right(prompt), found.right(prompt, FIVE)
    objects = all(rank == 0 for rank in found.ranks)
    return Judged(prompt, ", ".join(words), first, five, found.ground.colour, right, found.match, objects)


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """Counts: `n`, of which `named` ask for known objects; `first`, `five`, `objects` of those; `ground` of `ground_n`.

    And quantiles of the match.
    """
    grounds = [j.ground_right for j in judged if j.ground_right is not None]
    found = {
        "n": len(judged),
        "named": sum(bool(j.prompt.objects) for j in judged),
        "first": sum(j.first for j in judged),
        "five": sum(j.five for j in judged),
    }
    found |= {"objects": sum(j.objects for j in judged), "ground": sum(grounds), "ground_n": len(grounds)}
    matches = [j.match for j in judged] or [0.0]
    found |= {f"match_p{q:02d}": round(float(np.percentile(matches, q)), 4) for q in (5, 50)}
    return found


def by_group(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Summaries of single objects by their group, of the other kinds by kind."""
    groups: dict[str, list[Judged]] = {}
    for j in judged:
        single = j.prompt.family == "single"
        groups.setdefault(j.prompt.objects[0].group if single else j.prompt.kind, []).append(j)
    return {name: summary(members) for name, members in groups.items()}


def _vae(model: Any, settings: dict[str, Any]) -> VAE:
    from ldm.checkpoint import load_model

    return load_model(model, **{key: settings[key] for key in ("vae", "device", "dtype") if key in settings}).vae


def control(
    prompts: Sequence[Prompt], seeds: Sequence[int], font: str | Path | None = None, vae: VAE | None = None
) -> dict[str, Any]:
    """What the judge says of true scenes, by their own prompts (`real`) and by prompts of other classes (`shuffled`).

    `autoencoder`: of the true scenes encoded and decoded by `vae`, which no model that draws its latents surpasses.
    `shuffled` is None where the list holds too few classes to give every picture another one's prompt, `autoencoder`
    where there is no VAE, and all are where there is no true scene of a prompt.
    """
    found: dict[str, Any] = dict.fromkeys(CONTROLS)
    if not all(prompt.objects for prompt in prompts):
        return found
    other, pictures = shuffle(prompts), real_pictures(prompts, seeds, font)
    judged = judge_by(pictures, [prompts, *([other] if other else [])], font)
    found |= {"real": summary(judged[0]), "shuffled": summary(judged[1]) if other else None}
    if vae is not None:
        found["autoencoder"] = summary(judge_pictures(through(vae, pictures), prompts, font))
    return found


def through(vae: VAE, pictures: Sequence[np.ndarray]) -> list[Image]:
    """Pictures uint8 (H, W, 3) after encoding, to the mean, and decoding: one at a time."""
    import torch
    from PIL import Image

    from ldm.images import to_pil, to_tensor

    drawn = [to_tensor(Image.fromarray(picture)) for picture in pictures]
    with torch.no_grad():
        return [to_pil(vae.decode(vae.encode(one)).cpu())[0] for one in drawn]


def shuffle(prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """The same prompts in another order, such that none keeps its class (its classes, for several objects).

    Sorted by class and moved on by the size of the largest class, which works whenever anything does.
    """
    keys = [tuple(sorted(o.looks for o in p.objects)) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: keys[i])
    largest = max(keys.count(key) for key in set(keys))
    if 2 * largest > len(prompts):
        return None
    moved = list(prompts)
    for i, j in zip(order, order[largest:] + order[:largest]):
        moved[i] = prompts[j]
    return moved


def table(report: dict[str, Any]) -> str:
    """The report as text: one line a group, then the whole, then the judge's own controls."""
    rows = [*report["groups"].items(), ("all", report["score"])]
    rows += [(label, report[key]) for key, label in CONTROLS.items() if report.get(key)]
    width = max(len(name) for name, _ in rows)
    head = f"{'':{width}}  {'first guess':>14} {'first five':>14} {'ground':>14} {'match: median':>15} {'5 %':>5}"
    lines = [f"{report['list']}, {report['n']} pictures by {report['model']}", head]
    for name, s in rows:
        cells = (_share(s["first"], s["named"]), _share(s["five"], s["named"]), _share(s["ground"], s["ground_n"]))
        match = f" {s['match_p50']:>15.2f} {s['match_p05']:>5.2f}"
        lines.append(f"{name:{width}}  " + " ".join(f"{cell:>14}" for cell in cells) + match)
    return "\n".join(lines)


CONTROLS = {
    "real": "the judge on true scenes",
    "shuffled": "… with shuffled captions",
    "autoencoder": "… passed through the autoencoder",
}


def _share(part: int, whole: int) -> str:
    return f"{part}/{whole} {100 * part / whole:3.0f} %" if whole else "-"


def _write(folder: Path, report: dict[str, Any], pictures: Sequence, judged: Sequence[Judged]) -> None:
    from ldm.evaluation.sheet import contact_sheet
    from ldm.images import encode

    atomic_write(folder / "sheet.png", encode(contact_sheet(pictures, judged)))
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
    console.say(f"wrote {atomic_write(folder / 'scores.json', text)} and sheet.png")
