"""What `ldm bench` measured: as JSON, as a page, and beside an older measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldm.bench.compute import ComputeComparison
from ldm.bench.machine import facts_line
from ldm.bench.samplers import Comparison
from ldm.bench.timing import OURS, Timing
from ldm.errors import ConfigError, one_line
from ldm.files import format_bytes
from ldm.report import html_page

Result = Timing | Comparison | ComputeComparison  # of any bench
FORMAT = 1
STYLE = """
body { margin: 2em; }
td, th { border-bottom: 1px solid #8884; padding: .35em .8em; text-align: right; vertical-align: top; }
td:first-child, th:first-child { text-align: left; }
small { opacity: .75; }
td:not(:first-child) small { white-space: nowrap; }
"""
SIZE = ("size", "depth", "model", "config", "images", "batch_size", "sampler", "num_inference_steps", "dtype", "device")


def as_json(facts: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """One JSON document of the machine and all results."""
    return {"format": FORMAT, "machine": dict(facts), "benches": [result.as_json() for result in results]}


def read(path: str | Path) -> dict[str, Any]:
    """What `as_json` made, from a file. Raises ConfigError."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"cannot be read ({one_line(str(error))[:80]})", where=path, hint="give a file of --json"
        ) from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("benches"), list):
        raise ConfigError("is no measurement of `ldm bench`", where=path, hint="give a file of --json")
    return found


def against(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines that compare two documents: our seconds, and our ratios to the other sides, then and now.

    A row of another size, model or dtype is not compared, and named.
    """
    lines = [f"then: {facts_line(old['machine'])}", f"now:  {facts_line(new['machine'])}"]
    before = {one["bench"]: one for one in old["benches"]}
    for one in new["benches"]:
        was = before.get(one["bench"])
        if was is None or not one.get("seconds") or not was.get("seconds"):
            lines.append(f"{one['bench']:12} not in both")
            continue
        if other := [name for name in SIZE if one["settings"].get(name) != was["settings"].get(name)]:
            lines.append(f"{one['bench']:12} not compared: another {', '.join(other)}")
            continue
        then, now = was["medians"][OURS], one["medians"][OURS]
        line = f"{one['bench']:12} {then:.3f} s then, {now:.3f} s now: {now / then:.2f} of the time"
        both = [side for side in one["medians"] if side in was["medians"] and side != OURS]
        parts = (f"{side} {then / was['medians'][side]:.2f} -> {now / one['medians'][side]:.2f}" for side in both)
        lines.append("; ratio to ".join([line, *parts]))
    return lines


def page(facts: Mapping[str, Any], measured: Sequence[Result], old: Mapping[str, Any] | None = None) -> str:
    """An HTML page with a table: a line for each row, a column for each side; below, the comparison with `old`."""
    results = [result for result in measured if isinstance(result, Timing)]
    sides = list(dict.fromkeys(side for result in results for side in (*result.seconds, *result.left_out)))
    heads = "".join(f"<th>{escape(side)}</th>" for side in sides)
    lines = [_line(result, sides) for result in results]
    body = f"<h1>ldm bench</h1>\n<p>{escape(facts_line(facts))}<br><code>{escape(facts['command'])}</code></p>\n"
    body += f"<table>\n<tr><th></th>{heads}</tr>\n" + "\n".join(lines) + "\n</table>\n"
    body += "<p><small>median seconds (least to most), our time divided by this side's, peak memory</small></p>"
    if old is not None:
        compared = escape("\n".join(against(old, as_json(facts, results))))
        body += f"\n<h2>Against an older measurement</h2>\n<pre>{compared}</pre>"
    return html_page("ldm bench", body, STYLE, images="'none'")


def _line(result: Timing, sides: Sequence[str]) -> str:
    told = ", ".join(f"{name} {result.settings[name]}" for name in SIZE if name in result.settings)
    told += "".join(f"<br>{escape(name)} {value:.2g}" for name, value in result.agreement.items())
    head = f"{escape(result.title or result.name)}<br><small>{told}</small>"
    return f"<tr><td>{head}</td>{''.join(f'<td>{_cell(result, side)}</td>' for side in sides)}</tr>"


def _cell(result: Timing, side: str) -> str:
    if side in result.left_out:
        return f"<small>{escape(result.left_out[side])}</small>"
    if side not in result.seconds:
        return ""
    values, ratio = result.seconds[side], result.ratio_to(side)
    found = f"{result.medians[side]:.3f} <small>({min(values):.3f} to {max(values):.3f})</small>"
    found += "" if ratio is None else f"<br><small>ratio {ratio:.2f}</small>"
    return found + (f"<br><small>{format_bytes(result.memory[side])}</small>" if side in result.memory else "")
