"""What a linear reader can tell from a text encoder's states: which object and colour, which of two things is where."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import console
from ldm.config import require
from ldm.data.emoji import SceneConfig, Scenes, objects
from ldm.data.emoji.labels import Labels, label_sizes, labels_of, mirrored
from ldm.errors import ModelError
from ldm.files import atomic_write, require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.nn.readers import Readers
    from ldm.nn.text import TextEncoder

EPOCHS, RATE, BATCH, CHUNK = 12, 2e-3, 256, 128
PAIRS = 0.4  # share of captions of two things and where they are
LEAST = 100  # captions
SINGLE = SceneConfig(objects="all", everyday_share=0.0, casual=0.5)
UNSEEN = SceneConfig(objects="all", everyday_share=0.0, casual=0.5, held_out=True)


def evaluate_text(
    model: str | Path = "default",
    out: str | Path | None = None,
    *,
    n: int = 10_000,
    fit: int = 16_000,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Fit linear readers to a model's text encoder and print what they tell of captions that nobody was trained on.

    model  "default", a folder of a model or of a run's text encoder, a hub id
    out    a folder for `text.json`; None writes nothing
    n      unseen captions, two fifths of them of pairs: each with its mirror, in which the things are exchanged. Their
           combinations (thing and background, thing left of thing) are held out from training.
    fit    captions that the readers learn from, of combinations that training shows
    seed   of both
    device of the text encoder

    Readers see the mean of the states that a U-Net attends to. Things have all their words, as people type them too.
    The report holds `objects` (things that look alike count as one), `colour`, `order`, `axis` and `count` as
    fractions. Raises ConfigError, ModelError, and ResourceError for `out`.
    """
    for name, value in (("n", n), ("fit", fit)):
        require(value >= LEAST, f"must be at least {LEAST}, got {value}", name)
    if out is not None:
        require_writable(out)
    text = _text_encoder(model, device)
    means, labels = _read(text, fit, seed, False)
    readers = fitted(means, labels, seed)
    report: dict[str, Any] = {"model": str(model), "n": n, "fit": fit, "seed": seed}
    report |= scores(readers, *_read(text, n, seed + 1, True))
    console.say(told(report))
    if out is not None:
        path = atomic_write(Path(out) / "text.json", json.dumps(report, indent=1) + "\n")
        console.say(f"wrote {path}")
    return report


def told(report: Mapping[str, Any]) -> str:
    """The report as one line."""
    shares = ", ".join(f"{name} {100 * report[name]:.2f} %" for name in ("objects", "colour", "order", "axis", "count"))
    return f"text of {report['model']}, read linearly over {report['n']} unseen captions: {shares}"


def _text_encoder(model: str | Path, device: str) -> TextEncoder:
    from ldm.checkpoint.model import resolve
    from ldm.checkpoint.parts import load_text_from
    from ldm.device import pick_device

    path = Path(model)
    inner = next((folder for folder in (path / "model", path) if (folder / "text_encoder").is_dir()), None)
    folder = inner or resolve(model)
    if not folder.is_dir():
        raise ModelError("is a single file; its text encoder is read from a folder", where=model, hint="ldm convert")
    return load_text_from(folder).to(pick_device(device))


def unseen_captions(count: int, seed: int, unseen: bool = True) -> list[tuple[str, Labels]]:
    """`count` captions with what they say: single things, then pairs with their mirrors; `unseen`: held out."""
    singles = count - 2 * round(PAIRS * count / 2)
    scenes, found = Scenes(UNSEEN if unseen else SINGLE, seed), []
    for spec in map(scenes.spec, range(singles)):
        found.append((spec.caption, labels_of(spec)))
    for index in range((count - singles) // 2):
        found += mirrored(seed, index, unseen)
    return found


def _read(text: TextEncoder, count: int, seed: int, unseen: bool) -> tuple[Tensor, Tensor]:
    """Mean states (count, D) and labels of drawn captions."""
    import torch

    captions, labels = zip(*unseen_captions(count, seed, unseen))
    parts = [list(captions[i : i + CHUNK]) for i in range(0, count, CHUNK)]
    bar = console.progress(parts, desc="unseen captions" if unseen else "captions to fit", unit="batch")
    means = torch.cat([text.encode_together(part).states.mean(1).float().cpu() for part in bar])
    return means, torch.tensor(labels)


def fitted(means: Tensor, labels: Tensor, seed: int = 0) -> Readers:
    """Linear readers fitted to mean states (N, D) and labels (N, number of labels) by AdamW."""
    import torch

    from ldm.nn.readers import Readers, reading_loss

    readers = Readers(label_sizes()._asdict(), means.mean(0), means.std(0) + 1e-6)
    optimizer = torch.optim.AdamW(readers.parameters(), lr=RATE, weight_decay=0)
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - epoch / EPOCHS)
        for rows in torch.randperm(len(means), generator=torch.Generator().manual_seed(seed + epoch)).split(BATCH):
            loss = reading_loss(readers(means[rows]), labels[rows], order=1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return readers


def scores(readers: Readers, means: Tensor, labels: Tensor) -> dict[str, float]:
    """The fractions that are told right. Of objects, one that looks the same is right too."""
    import torch

    from ldm.nn.readers import order_margin

    with torch.no_grad():
        said = readers(means)
    wanted = dict(zip(Labels._fields, labels.T))
    looks = [thing.lookalike_class for thing in objects()]
    there = wanted["object"] >= 0
    guesses = zip(said["object"][there].argmax(1).tolist(), wanted["object"][there].tolist())
    found = {"objects": _mean([looks[guess] == looks[right] for guess, right in guesses])}
    found["order"] = _mean((order_margin(said, labels) > 0).tolist())
    for name in ("colour", "axis", "count"):
        there = wanted[name] >= 0
        found[name] = _mean((said[name][there].argmax(1) == wanted[name][there]).tolist())
    return found


def _mean(right: list[bool]) -> float:
    return sum(right) / max(1, len(right))
