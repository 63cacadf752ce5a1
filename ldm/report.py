"""Pictures of numbers without a plotting library: SVG line plots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 640, 360, 64, 44, 16, 16
POINTS = 600  # more than this many points a line are averaged


def line_plot(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, log: bool = False) -> str:
    """An SVG with one line for each name: points (x, y); `log` for a logarithmic y axis (positive values only)."""
    kept = {name: _thin([p for p in pts if _usable(p, log)]) for name, pts in lines.items()}
    flat = [p for pts in kept.values() for p in pts]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
    head += 'font-size="12">'
    body = [head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
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
    for i in range(6):
        a, b = x0 + (x1 - x0) * i / 5, y0 + (y1 - y0) * i / 5
        px, py = place(a, b)
        drawn.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}" stroke="#ddd"/>')
        drawn.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{a:.6g}</text>')
        drawn.append(f'<text x="{LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">{10**b if log else b:.3g}</text>')
    return drawn
