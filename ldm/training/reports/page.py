"""The page of a run, RUN/index.html: one static file beside the images that it shows, written anew as the run goes.

It has no script and asks nothing of a network; while the run goes, the browser reads it again every minute.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from ldm.files import atomic_write
from ldm.report import html_page, line_plot
from ldm.training.loop.logs import Best, RunLogs
from ldm.training.settings import Settings, as_dict, flat

GRIDS = 24  # sample grids shown, evenly spread over the run; the first and the last always
EVERY = 60  # seconds between two readings of a run that goes
STYLE = """
body { margin: 0 auto; max-width: 84em; padding: 1em; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: .3em 2.4em; margin: 0; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.25em; } .facts span { opacity: .7; }
.bar { height: .5em; margin: .8em 0; background: color-mix(in srgb, CanvasText 15%, Canvas); }
.bar i { display: block; height: 100%; background: #1f77b4; }
svg { display: block; border: 1px solid color-mix(in srgb, CanvasText 15%, Canvas); }
figure { flex: 0 1 34em; } figcaption { font-size: .85em; }
.plots figure { flex: 1 1 24em; max-width: 36em; }
td { padding: .1em 1.2em .1em 0; vertical-align: top; }
td:first-child { opacity: .7; white-space: nowrap; } tr { break-inside: avoid; }
.columns { columns: 26em; }
"""


def write_page(
    logs: RunLogs,
    settings: Settings,
    step: int,
    status: str,  # "running", "done", "stopped: …"
    best: Best | None,
    lines: Sequence[str],  # what the stage has to say of its data
    pace: tuple[float, float] | None,  # samples a second, seconds a step
) -> Path:
    """Write the page over that of before. Raises ResourceError where it cannot be written."""
    out, losses, scores = logs.out, logs.rows("loss.jsonl"), logs.rows("scores.jsonl")
    body = [f"<h1>{escape(out.resolve().name)}: {escape(settings.stage)}, {escape(status)}</h1>"]
    body.append(_facts(settings, step, scores, best, pace))
    body.append(f'<div class="bar"><i style="width:{100 * step / settings.steps:.1f}%"></i></div>')
    if losses or scores:
        body.append(f'<h2>Curves</h2><div class="row plots">{"".join(_curves(losses, scores))}</div>')
    body += _grids(out)
    if lines:
        body += ["<h2>Data</h2>", "<p>", "<br>".join(map(escape, lines)), "</p>"]
    body += ["<h2>Settings</h2>", _table(flat(as_dict(settings)))]
    refresh = EVERY if status == "running" else None
    page = html_page(out.resolve().name, "\n".join(body), STYLE, images="'self' file:", refresh=refresh)
    return atomic_write(out / "index.html", page.encode("utf-8", "replace"))


def _facts(
    settings: Settings,
    step: int,
    scores: Sequence[Mapping[str, Any]],
    best: Best | None,
    pace: tuple[float, float] | None,
) -> str:
    facts = {"step": f"{step} of {settings.steps}", "written": time.strftime("%Y-%m-%d %H:%M:%S")}
    if pace:
        left = (settings.steps - step) * pace[1]
        facts["samples a second"] = f"{pace[0]:.3g}"
        if step < settings.steps:
            facts["left, scores aside"] = str(timedelta(seconds=round(left)))
    if scores:
        facts |= {name: f"{value:.4g}" for name, value in scores[-1].items() if name != "step"}
    if best is not None:
        facts[f"best checkpoint, by {best.name}"] = f"step {best.step}: {best.value:.4g}"
    items = (f"<li><span>{escape(name)}</span><b>{escape(value)}</b></li>" for name, value in facts.items())
    return f'<ul class="facts">{"".join(items)}</ul>'


def _curves(losses: Sequence[Mapping[str, float]], scores: Sequence[Mapping[str, float]]) -> list[str]:
    """Training and validation loss together, then each score by itself, and the learning rate."""
    series = {name: [(row["step"], row[name]) for row in scores if name in row] for row in scores for name in row}
    series.pop("step", None)
    both = {"training": [(row["step"], row["loss"]) for row in losses]}
    if "validation_loss" in series:
        both["validation"] = series["validation_loss"]
    plots = {"loss": line_plot(both, "step", "", log=True)}
    series["learning rate"] = [(row["step"], row["lr"]) for row in losses]
    plots |= {name.replace("_", " "): line_plot({"": points}, "step", "") for name, points in series.items()}
    return [f"<figure>{plot}<figcaption>{escape(name)}</figcaption></figure>" for name, plot in plots.items()]


def _grids(out: Path) -> list[str]:
    found = sorted((out / "samples").glob("step-*.png"))
    if not found:
        return []
    count = min(GRIDS, len(found))
    shown = [found[round(i * (len(found) - 1) / max(1, count - 1))] for i in range(count)]
    said = f" ({count} of {len(found)})" if count < len(found) else ""
    figures = (
        f'<figure><img loading="lazy" alt="samples" src="samples/{path.name}">'
        f"<figcaption>step {int(path.stem.removeprefix('step-'))}</figcaption></figure>"
        for path in reversed(shown)
    )
    return [f"<h2>Samples, the newest first{said}</h2>", f'<div class="row">{"".join(figures)}</div>']


def _table(settings: Mapping[str, Any]) -> str:
    rows = []
    for name, value in settings.items():
        told = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"<tr><td>{escape(name)}</td><td>{escape(told)}</td></tr>")
    return f'<div class="columns"><table>{"".join(rows)}</table></div>'
