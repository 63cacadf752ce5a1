"""Scores of a model: rendering a list of prompts, judging the images, controls beside the score, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ldm import console
from ldm.checkpoint import Model, load_model
from ldm.data.emoji import Scene
from ldm.errors import ConfigError
from ldm.evaluation.contours import conditions_of, contours, line
from ldm.evaluation.judge import shared_judge
from ldm.evaluation.judged import Judged, judge_by, judge_images
from ldm.evaluation.lists import Prompt, open_list
from ldm.evaluation.real import real_images
from ldm.evaluation.sheet import contact_sheet
from ldm.files import atomic_write, require_writable
from ldm.images import encode, to_pil, to_tensor
from ldm.nn.vae import VAE
from ldm.pipeline.pipeline import Pipeline

PIPELINE_ARGUMENTS = ("negative_prompt", "lora", "fast", "controlnet", "vae", "device", "dtype")  # the rest: `generate`

Renderer = Callable[[list[str], list[int]], Sequence[Image.Image | np.ndarray]]


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
    control: str | None = None,
    font: str | Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Render a list of prompts with a model, judge the images, print a table, and return the report.

    model       "default", a folder, a hub id or a loaded model
    prompts     a list's name ("everyday", "all", "everyday-30", "pairs-20", … see ldm.evaluation.LISTS), a file of that
                form, or a sequence of Prompt or (text, object[, colour])
    out         a folder for `scores.json` and the contact sheet `sheet.png`; None writes nothing
    n           only the first n prompts
    seed        image i (from 1) is drawn with seed + i
    batch_size  images that are denoised together
    renderer    replaces the model: (texts, seeds) -> images
    controls    also judge true scenes of the prompts, the same against shuffled prompts, and reconstructed by the VAE
    control     a kind of ldm.control ("edges"): each image is drawn with the condition of its prompt's true scene, by
                the model's own ControlNet of that name or by controlnet=…; the report then has `contours`
    font        the font's file, if it is not in a usual place
    settings    go to Pipeline and generate: num_inference_steps, guidance_scale, sampler, dtype, device, …

    The report holds `score`, `groups`, `real`, `shuffled`, `autoencoder` and `images` (one entry each). Raises
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
    asked, scenes = settings, None
    if control is not None:
        if not all(entry.objects for entry in entries):
            raise ConfigError(f"the list {name} has prompts without a true scene to follow", where="control")
        scenes = real_images(entries, seeds, font)
        asked = {"controlnet": control, **settings, "control_image": conditions_of(control, scenes)}
    draw = renderer or pipeline_renderer(model, [e.text for e in entries], batch_size, asked)
    shared_judge(font)  # a missing font is an error before anything is drawn
    images = list(draw([e.text for e in entries], seeds))
    judged = judge_images(images, entries, font=font)
    report = {"list": name, "model": str(getattr(model, "name", model)), "n": len(entries), "seed": seed}
    report |= {"settings": settings, "score": summary(judged), "groups": by_group(judged)}
    if scenes is not None:
        report |= {"control": control, "contours": contours(images, scenes)}
    if controls:
        report |= true_scenes(entries, seeds, font, None if renderer else _vae(model, settings))
    report["images"] = [{"line": i, "seed": s, **j.as_json()} for i, (s, j) in enumerate(zip(seeds, judged), 1)]
    print("\n".join([table(report), *([line(report["contours"])] if scenes is not None else [])]), flush=True)
    if out is not None:
        _write(Path(out), report, images, judged)
    return report


def pipeline_renderer(model: Any, texts: list[str], batch_size: int | None, settings: dict[str, Any]) -> Renderer:
    """A renderer that draws one image of each text with a Pipeline. Raises before any weight is read."""
    pipeline_settings = {key: value for key, value in settings.items() if key in PIPELINE_ARGUMENTS}
    generate_settings = {key: value for key, value in settings.items() if key not in pipeline_settings}
    pipeline = Pipeline(texts, model=model, **pipeline_settings)
    return lambda _, seeds: pipeline.generate(num_images=1, seed=seeds, batch_size=batch_size, **generate_settings)


def judge_scenes(
    images: Sequence[Image.Image | np.ndarray], scenes: Sequence[Scene], font: str | Path | None = None
) -> dict[str, Any]:
    """The score of images drawn from the captions of these scenes: `first`, `five`, `background`, … (see `summary`)."""
    return summary(judge_images(images, [Prompt.of(scene.spec) for scene in scenes], font))


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """Counts and quantiles of the match.

    `n` images, of which `named` ask for known objects; `first`, `five`, `objects` are counts of those, and `background`
    is a count of the `background_n` prompts that name a background.
    """
    backgrounds = [j.background_right for j in judged if j.background_right is not None]
    counts = {"n": len(judged), "named": sum(bool(j.prompt.objects) for j in judged)}
    counts |= {name: sum(getattr(j, name) for j in judged) for name in ("first", "five", "objects")}
    counts |= {"background": sum(backgrounds), "background_n": len(backgrounds)}
    matches = [j.match for j in judged] or [0.0]
    counts |= {f"match_p{q:02d}": round(float(np.percentile(matches, q)), 4) for q in (5, 50)}
    return counts


def by_group(judged: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """Summaries of single objects by group, of the other kinds by kind."""
    groups: dict[str, list[Judged]] = {}
    for j in judged:
        single = j.prompt.family == "single"
        groups.setdefault(j.prompt.objects[0].group if single else j.prompt.kind, []).append(j)
    return {name: summary(members) for name, members in groups.items()}


def _vae(model: Any, settings: dict[str, Any]) -> VAE:
    return load_model(model, **{key: settings[key] for key in ("vae", "device", "dtype") if key in settings}).vae


def true_scenes(
    prompts: Sequence[Prompt], seeds: Sequence[int], font: str | Path | None = None, vae: VAE | None = None
) -> dict[str, Any]:
    """Scores of true scenes by their own prompts (`real`) and by prompts of other classes (`shuffled`).

    `autoencoder`: scores of the true scenes after encoding and decoding by `vae`, a limit for every model that draws
    its latents. `shuffled` is None where the list has too few classes to give every image the prompt of another class,
    `autoencoder` where there is no VAE, and all three where a prompt has no true scene.
    """
    report: dict[str, Any] = dict.fromkeys(CONTROLS)
    if not all(prompt.objects for prompt in prompts):
        return report
    shuffled, images = shuffle(prompts), real_images(prompts, seeds, font)
    judged = judge_by(images, [prompts, *([shuffled] if shuffled else [])], font)
    report |= {"real": summary(judged[0]), "shuffled": summary(judged[1]) if shuffled else None}
    if vae is not None:
        report["autoencoder"] = summary(judge_images(reconstruct(vae, images), prompts, font))
    return report


def reconstruct(vae: VAE, images: Sequence[np.ndarray]) -> list[Image.Image]:
    """Images uint8 (H, W, 3) after encoding to the mean and decoding, one at a time."""
    drawn = [to_tensor(Image.fromarray(image)) for image in images]
    with torch.no_grad():
        return [to_pil(vae.decode(vae.encode(one)).cpu())[0] for one in drawn]


def shuffle(prompts: Sequence[Prompt]) -> list[Prompt] | None:
    """The same prompts in an order in which none keeps its class (its classes, for several objects), or None.

    They are sorted by class and moved on by the size of the largest class, which succeeds whenever it is possible.
    """
    keys = [tuple(sorted(o.lookalike_class for o in p.objects)) for p in prompts]
    order = sorted(range(len(prompts)), key=lambda i: keys[i])
    largest = max(keys.count(key) for key in set(keys))
    if 2 * largest > len(prompts):
        return None
    moved = list(prompts)
    for i, j in zip(order, order[largest:] + order[:largest]):
        moved[i] = prompts[j]
    return moved


def table(report: dict[str, Any]) -> str:
    """The report as text: a line for each group, one for all, and one for each control."""
    rows = [*report["groups"].items(), ("all", report["score"])]
    rows += [(label, report[key]) for key, label in CONTROLS.items() if report.get(key)]
    width = max(len(name) for name, _ in rows)
    head = f"{'':{width}}  {'first guess':>14} {'first five':>14} {'background':>14} {'match: median':>15} {'5 %':>5}"
    lines = [f"{report['list']}, {report['n']} images by {report['model']}", head]
    for name, s in rows:
        counts = (("first", "named"), ("five", "named"), ("background", "background_n"))
        cells = [_share(s[part], s[whole]) for part, whole in counts]
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


def _write(folder: Path, report: dict[str, Any], images: Sequence, judged: Sequence[Judged]) -> None:
    atomic_write(folder / "sheet.png", encode(contact_sheet(images, judged)))
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n"
    console.say(f"wrote {atomic_write(folder / 'scores.json', text)} and sheet.png")
