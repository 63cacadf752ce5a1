"""Pages and plots without a library: the frame of a static HTML page; SVG line plots, one or several side by side."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 76, 44, 16, 24
POINTS = 600  # more than this many points a line are averaged


BASE_STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 0; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin: 1.6em 0 .4em; }
figure { margin: 0; }
.row { display: flex; flex-wrap: wrap; gap: 1em; align-items: flex-start; }
img { display: block; max-width: 100%; }
table { border-collapse: collapse; }
"""


def html_page(title: str, body: str, style: str, images: str, script: str = "", refresh: int | None = None) -> str:
    """A static HTML page without server, network or anything from elsewhere.

    title    as text
    body     HTML
    style    CSS behind BASE_STYLE
    images   where images may come from, as a Content-Security-Policy says it: "data:", "'self' file:"
    script   JavaScript, run when the body is there
    refresh  seconds after which the browser reads the page again

    The page's policy lets the browser run this very script and load nothing from elsewhere.
    """
    style = BASE_STYLE + style
    policy = f"default-src 'none'; img-src {images}; "
    policy += f"script-src {_hash(script)}; style-src {_hash(style)}" if script else "style-src 'unsafe-inline'"
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh is not None else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}; base-uri 'none'; form-action 'none'\">\n"
        f'<meta name="viewport" content="width=device-width">\n{again}'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def line_plot(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, log: bool = False) -> str:
    """An SVG with one line for each name: points (x, y); `log` for a logarithmic y axis (positive values only)."""
    kept = {name: _thin([p for p in pts if _usable(p, log)]) for name, pts in lines.items()}
    flat = [p for pts in kept.values() for p in pts]
    body = _head(WIDTH, HEIGHT)
    if flat:
        xs, ys = ([f(p[i]) for p in flat] for i, f in ((0, float), (1, math.log10 if log else float)))
        body += _axes(min(xs), max(xs), min(ys), max(ys), log)
        place = _placer(min(xs), max(xs), min(ys), max(ys))
        for number, (name, points) in enumerate(kept.items()):
            colour = COLOURS[number % len(COLOURS)]
            path = " ".join("{:.1f},{:.1f}".format(*place(a, math.log10(b) if log else b)) for a, b in points)
            body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            body.append(f'<text x="{LEFT + 10}" y="{TOP + 14 * (number + 1)}" fill="{colour}">{escape(name)}</text>')
    body.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    body.append(f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})">{escape(y)}</text></svg>')
    return "\n".join(body) + "\n"


def _head(width: float, height: float) -> list[str]:
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
    return [opened + 'font-size="12">', f'<rect width="{width}" height="{height}" fill="white"/>']


def _usable(point: tuple[float, float], log: bool) -> bool:
    return all(map(math.isfinite, point)) and (point[1] > 0 or not log)


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = max(1, math.ceil(len(points) / POINTS))
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(a for a, _ in c) / len(c), sum(b for _, b in c) / len(c)) for c in chunks]


def _placer(x0: float, x1: float, y0: float, y1: float):
    def place(a: float, b: float) -> tuple[float, float]:
        return (
            LEFT + (a - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (b - y0) / ((y1 - y0) or 1) * (HEIGHT - BOTTOM - TOP),
        )

    return place


def _axes(x0: float, x1: float, y0: float, y1: float, log: bool) -> list[str]:
    place, drawn = _placer(x0, x1, y0, y1), []
    digits = 3 if log else _digits(y0, y1)
    for i in range(6):
        a, b = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        px, py = place(a, b)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{a:.6g}</text>')
        drawn.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{10**b if log else b:.{digits}g}</text>')
    return drawn


def _digits(low: float, high: float) -> int:
    """How many, from 3 on, tell the six ticks of an axis from each other."""
    widest, apart = max(abs(low), abs(high)), (high - low) / 5
    return min(12, max(3, 1 + math.ceil(math.log10(widest) - math.log10(apart)))) if apart > 0 else 3


# Marks of lines in `log_panels`: corners and degrees of the first one; a circle is a polygon of 20.
MARKS = ((20, 0), (4, 45), (3, 30), (4, 0), (3, -30), (5, -90), (6, 0))
TALL, WIDE, BETWEEN, LEGEND, LINE = 300, 330, 24, 150, 15  # px


def log_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], y: str, notes: Sequence[str] = ()
) -> str:
    """An SVG with a panel for each x axis, side by side: {x: {name: points}}, both axes logarithmic, y shared.

    A name has one colour and mark in all panels. x is ticked at powers of two; points that are not positive numbers
    are left out. `notes` are lines of text below.
    """
    kept = {
        x: {name: [p for p in points if all(1e-99 < v < 1e99 for v in p)] for name, points in lines.items()}
        for x, lines in panels.items()
    }
    names = list(dict.fromkeys(name for lines in kept.values() for name in lines))
    heights = [b for lines in kept.values() for points in lines.values() for _, b in points]
    legend, foot = LEFT + len(kept) * (WIDE + BETWEEN), TOP + TALL + BOTTOM
    body = _head(legend + LEGEND, foot + LINE * (len(notes) + (len(notes) > 0)))
    for number, (x, lines) in enumerate(kept.items()):
        body += _panel(lines, names, LEFT + number * (WIDE + BETWEEN), x, _padded(heights), number == 0)
    for number, name in enumerate(names):
        place = legend + 6, TOP + 8 + 20 * number
        body += _line(number, [place, (place[0] + 22, place[1])])
        body.append(f'<text x="{place[0] + 34}" y="{place[1] + 4}">{escape(name)}</text>')
    middle = TOP + TALL / 2
    body.append(
        f'<text x="16" y="{middle}" transform="rotate(-90 16 {middle})" text-anchor="middle">{escape(y)}</text>'
    )
    body += [
        f'<text x="16" y="{foot + LINE * (i + 1)}" font-size="11" fill="#555">{escape(note)}</text>'
        for i, note in enumerate(notes)
    ]
    return "\n".join([*body, "</svg>"]) + "\n"


def _panel(
    lines: Mapping[str, list[tuple[float, float]]],
    names: list[str],
    left: float,
    x: str,
    span: tuple[float, float],
    labelled: bool,
) -> list[str]:
    """One panel: its frame, grid and lines; y is labelled in the first."""
    widths = _padded([a for points in lines.values() for a, _ in points])
    bottom = TOP + TALL

    def at(value: float, ends: tuple[float, float]) -> float:
        return math.log(value / ends[0]) / math.log(ends[1] / ends[0])

    drawn = [f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{TALL}" fill="none" stroke="#999"/>']
    for tick in _ticks(widths, (1,), 2):
        px = left + WIDE * at(tick, widths)
        drawn.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>')
        drawn.append(f'<text x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick in _ticks(span, (1, 2, 5), 10):
        py = bottom - TALL * at(tick, span)
        drawn.append(f'<line x1="{left}" x2="{left + WIDE}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        if labelled:
            drawn.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for name, points in lines.items():
        places = [(left + WIDE * at(a, widths), bottom - TALL * at(b, span)) for a, b in points]
        drawn += _line(names.index(name), places)
    drawn.append(f'<text x="{left + WIDE / 2}" y="{bottom + 34}" text-anchor="middle">{escape(x)}</text>')
    return drawn


def _line(number: int, places: Sequence[tuple[float, float]]) -> list[str]:
    """A line through these places (px), with the colour and the marks of the number-th name."""
    colour, (corners, turn) = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>']
    for x, y in places:
        angles = [math.radians(turn + 360 * i / corners) for i in range(corners)]
        outline = " ".join(f"{x + 4.5 * math.cos(a):.1f},{y + 4.5 * math.sin(a):.1f}" for a in angles)
        drawn.append(f'<polygon points="{outline}" fill="{colour}" stroke="white" stroke-width="0.8"/>')
    return drawn


def _padded(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a logarithmic axis with a little room beyond the values; 1 to 10 without any."""
    low, high = min(values, default=1.0), max(values, default=10.0)
    room = max(1.02, (high / low) ** 0.06)
    return low / room, high * room


def _ticks(ends: tuple[float, float], parts: Sequence[int], base: int) -> list[float]:
    """part * base^k inside the ends, at most ten of them; the middle where there is none."""
    powers = range(math.floor(math.log(ends[0], base)), math.ceil(math.log(ends[1], base)) + 1)
    ticks = [tick for k in powers for part in parts if ends[0] <= (tick := part * float(base) ** k) <= ends[1]]
    if len(ticks) > 10 and len(parts) > 1:
        return _ticks(ends, (1,), base)
    return ticks[:: len(ticks) // 10 + 1] or [math.sqrt(ends[0] * ends[1])]
