"""Pages and plots without a library: the frame of a static HTML page; SVG line plots, one or several side by side."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

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


# Marks of lines in panels: corners and degrees of the first one; a circle is a polygon of 20.
MARKS = ((20, 0), (4, 45), (3, 30), (4, 0), (3, -30), (5, -90), (6, 0))
TALL, WIDE, BETWEEN, LEGEND, LINE = 300, 330, 24, 150, 15  # px

Points = Sequence[tuple[float, float]]


class _Panel(NamedTuple):
    """What one panel shows; x is logarithmic."""

    lines: Mapping[str, Points]
    x: str
    y: str
    heights: tuple[float, float]  # the ends of y
    log: bool  # whether y is logarithmic
    labelled: bool  # whether y has a title and numbers


def log_panels(panels: Mapping[str, Mapping[str, Points]], y: str, notes: Sequence[str] = ()) -> str:
    """An SVG with a panel for each x axis, side by side: {x: {name: points}}, both axes logarithmic, y shared.

    A name has one colour and mark in all panels. x is ticked at powers of two; points that are not positive numbers
    are left out. `notes` are lines of text below.
    """
    kept = {
        x: {name: [p for p in points if all(1e-99 < v < 1e99 for v in p)] for name, points in lines.items()}
        for x, lines in panels.items()
    }
    heights = _padded([b for lines in kept.values() for points in lines.values() for _, b in points])
    drawn = [_Panel(lines, x, y, heights, True, number == 0) for number, (x, lines) in enumerate(kept.items())]
    return _side_by_side(drawn, BETWEEN, notes)


def score_panels(panels: Mapping[str, Mapping[str, Points]], x: str, notes: Sequence[str] = ()) -> str:
    """An SVG with a panel for each score, side by side: {score: {name: points}}, x logarithmic, each y linear.

    A name has one colour and mark in all panels. Every point is marked, and a line goes through the mean of those at
    one x; points that are not finite, or whose x is not positive, are left out. `notes` are lines of text below.
    """
    drawn = []
    for y, lines in panels.items():
        kept = {n: [p for p in points if 1e-99 < p[0] < 1e99 and abs(p[1]) < 1e99] for n, points in lines.items()}
        heights = [b for points in kept.values() for _, b in points]
        low, high = min(heights, default=0.0), max(heights, default=1.0)
        room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        drawn.append(_Panel(kept, x, y, (low - room, high + room), False, True))
    return _side_by_side(drawn, LEFT, notes)


def _side_by_side(panels: Sequence[_Panel], between: int, notes: Sequence[str]) -> str:
    """The panels, the names of their lines on the right, and the notes below."""
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    legend, foot = LEFT + len(panels) * (WIDE + between) + BETWEEN - between, TOP + TALL + BOTTOM
    body = _head(legend + LEGEND, foot + LINE * (len(notes) + (len(notes) > 0)))
    for number, panel in enumerate(panels):
        body += _panel(panel, names, LEFT + number * (WIDE + between))
    for number, name in enumerate(names):
        place = legend + 6, TOP + 8 + 20 * number
        body += _line(number, [place, (place[0] + 22, place[1])])
        body.append(f'<text x="{place[0] + 34}" y="{place[1] + 4}">{escape(name)}</text>')
    for number, panel in enumerate(panel for panel in panels if panel.labelled):
        title, middle = 16 + number * (WIDE + between), TOP + TALL / 2
        turned = f'transform="rotate(-90 {title} {middle})" text-anchor="middle"'
        body.append(f'<text x="{title}" y="{middle}" {turned}>{escape(panel.y)}</text>')
    body += [
        f'<text x="16" y="{foot + LINE * (i + 1)}" font-size="11" fill="#555">{escape(note)}</text>'
        for i, note in enumerate(notes)
    ]
    return "\n".join([*body, "</svg>"]) + "\n"


def _panel(panel: _Panel, names: list[str], left: float) -> list[str]:
    """One panel: its frame, grid and lines."""
    widths, ends = _padded([a for points in panel.lines.values() for a, _ in points]), panel.heights
    bottom = TOP + TALL

    def across(value: float) -> float:
        return left + WIDE * math.log(value / widths[0]) / math.log(widths[1] / widths[0])

    def up(value: float) -> float:
        share = (value - ends[0]) / (ends[1] - ends[0])
        return bottom - TALL * (math.log(value / ends[0]) / math.log(ends[1] / ends[0]) if panel.log else share)

    drawn = [f'<rect x="{left}" y="{TOP}" width="{WIDE}" height="{TALL}" fill="none" stroke="#999"/>']
    for tick in _ticks(widths, (1,), 2):
        px = across(tick)
        drawn.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{TOP}" y2="{bottom}" stroke="#ddd"/>')
        drawn.append(f'<text x="{px:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    for tick in _ticks(ends, (1, 2, 5), 10) if panel.log else _even_ticks(ends):
        py = up(tick)
        drawn.append(f'<line x1="{left}" x2="{left + WIDE}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        if panel.labelled:
            drawn.append(f'<text x="{left - 6}" y="{py + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for name, points in panel.lines.items():
        number, places = names.index(name), [(across(a), up(b)) for a, b in points]
        drawn += _line(number, places, places if panel.log else _means(places))
    drawn.append(f'<text x="{left + WIDE / 2}" y="{bottom + 34}" text-anchor="middle">{escape(panel.x)}</text>')
    return drawn


def _means(places: Points) -> list[tuple[float, float]]:
    """For each x, in their order, the mean of the heights there."""
    heights: dict[float, list[float]] = {}
    for x, y in sorted(places):
        heights.setdefault(x, []).append(y)
    return [(x, sum(ys) / len(ys)) for x, ys in heights.items()]


def _line(number: int, places: Points, through: Points | None = None) -> list[str]:
    """Marks at these places (px) and a line through them or other ones, with the look of the number-th name."""
    colour, (corners, turn) = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (places if through is None else through))
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


def _even_ticks(ends: tuple[float, float]) -> list[float]:
    """Multiples, inside the ends, of the least of 1, 2, 5, 10, … times a power of ten that gives at most seven."""
    most = (ends[1] - ends[0]) / 6
    power = 10.0 ** math.floor(math.log10(most))
    step = next(part * power for part in (1, 2, 5, 10) if part * power >= most)
    return [k * step for k in range(math.ceil(ends[0] / step), math.floor(ends[1] / step) + 1)]
