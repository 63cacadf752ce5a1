"""The doctor's page: one HTML file with its images inside; it needs no script, server or network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

from ldm.data.doctor.diagnosis import Diagnosis, Finding
from ldm.data.sources import Source
from ldm.errors import DataError
from ldm.files import atomic_write
from ldm.report import html_page

THUMB = 112  # pixels
SHEET = 60  # images of the contact sheet, evenly spread
GROUPS, MEMBERS = 8, 6  # shown at most for a finding
STYLE = """
body { margin: 0 auto; max-width: 72em; padding: 1em; overflow-wrap: anywhere; }
.mend { border-left: .3em solid #c33; padding-left: .8em; } .note { border-left: .3em solid #888; padding-left: .8em; }
.hint { font-weight: 600; margin: .2em 0; }
.row, .group { display: flex; flex-wrap: wrap; gap: .8em; align-items: flex-start; }
.group { border: 1px solid color-mix(in srgb, CanvasText 25%, Canvas); padding: .4em; gap: .4em; }
figure { width: 7.5em; } figcaption { font-size: .72em; line-height: 1.25; }
img { background: #fff; border: 1px solid color-mix(in srgb, CanvasText 15%, Canvas); }
td, th { text-align: right; padding: .1em .8em .1em 0; font-weight: normal; }
th { opacity: .7; } td.bar { width: 22em; text-align: left; }
td.bar i { display: block; height: .8em; background: #1f77b4; }
"""


def write_page(path: Path, diagnosis: Diagnosis, source: Source) -> Path:
    """Write the page, replacing an older one. Raises ResourceError where it cannot be written."""
    images = _Images(source)
    body = [f"<h1>{escape(diagnosis.path)}</h1>"]
    body += [f"<p>{'<br>'.join(map(escape, diagnosis.lines[:3]))}</p>"]
    findings = sorted(diagnosis.findings, key=lambda finding: finding.hint is None)
    mend = sum(finding.hint is not None for finding in findings)
    body.append(f"<p><b>{f'{mend} things to mend' if mend else 'Nothing to mend'}</b></p>")
    body += [_finding(finding, images) for finding in findings]
    if diagnosis.estimate:
        body += ["<h2>A training here</h2>", f"<p>{'<br>'.join(map(escape, diagnosis.estimate))}</p>"]
    body += ["<h2>Sizes</h2>", _buckets(diagnosis), "<h2>Words of a caption</h2>", _bars(_binned(diagnosis.words))]
    body += ["<h2>Some of the images, as they are read</h2>", '<div class="row">']
    step = max(1, len(source) // SHEET)
    body += [images.figure(source[i].id) for i in range(0, len(source), step)][:SHEET]
    page = html_page(diagnosis.path, "\n".join([*body, "</div>"]), STYLE, images="data:")
    return atomic_write(path, page.encode("utf-8", "replace"))


class _Images:
    """Thumbnails by the ids of a source."""

    def __init__(self, source: Source):
        self.source = source
        self.index = {sample.id: i for i, sample in enumerate(source)}

    def figure(self, id: str) -> str:
        from PIL import Image

        if id not in self.index:
            return f"<figure><figcaption>{escape(id)}</figcaption></figure>"
        sample = self.source[self.index[id]]
        try:
            image = sample.image(at_least=THUMB)
        except DataError as error:
            return f"<figure><figcaption>{escape(str(error))}</figcaption></figure>"
        size = f"{image.width}x{image.height}"
        image.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        captions = escape(" | ".join(sample.captions)[:200] or "(no caption)")
        alt = escape(id, quote=True)
        return (
            f'<figure title="{alt} {size}"><img alt="{alt}" src="data:image/webp;base64,{data}">'
            f"<figcaption><b>{alt}</b><br>{captions}</figcaption></figure>"
        )


def _finding(finding: Finding, images: _Images) -> str:
    body = [f'<div class="{"mend" if finding.hint else "note"}"><h2>{escape(finding.what)}</h2>']
    if finding.hint:
        body.append(f'<p class="hint">{escape(finding.hint)}</p>')
    body.append('<div class="row">')
    for group in sorted(finding.groups, key=len, reverse=True)[:GROUPS]:
        figures = "".join(images.figure(id) for id in group[:MEMBERS])
        rest_of_group = f"<span>and {len(group) - MEMBERS} more</span>" if len(group) > MEMBERS else ""
        body.append(f'<div class="group">{figures}{rest_of_group}</div>' if len(group) > 1 else figures)
    rest = len(finding.groups) - GROUPS
    return "\n".join([*body, "</div>", f"<p>and {rest} more</p>" if rest > 0 else "", "</div>"])


def _buckets(diagnosis: Diagnosis) -> str:
    most = max(share.images for share in diagnosis.buckets)
    rows = [
        f"<tr><td>{s.bucket.width}x{s.bucket.height}</td><td>{s.images}</td><td>{s.enlarged}</td>"
        f"<td>{100 * s.lost:.1f} %</td>{_bar(s.images / most)}</tr>"
        for s in diagnosis.buckets
    ]
    head = "<tr><th>bucket</th><th>images</th><th>enlarged</th><th>cropped away</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _bars(counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=1)
    rows = [f"<tr><td>{escape(name)}</td><td>{n}</td>{_bar(n / most)}</tr>" for name, n in counts.items()]
    return f"<table>{''.join(rows)}</table>"


def _bar(share: float) -> str:
    return f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>'


def _binned(words: Mapping[int, int]) -> dict[str, int]:
    """Counts by 1, 2, … 9, 10-19, 20-29, … words."""
    bins: dict[str, int] = {}
    for length, count in words.items():
        name = str(length) if length < 10 else f"{length // 10 * 10}-{length // 10 * 10 + 9}"
        bins[name] = bins.get(name, 0) + count
    return bins
