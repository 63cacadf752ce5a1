"""Plots that are well-formed SVG whatever the numbers, with the lines where the numbers say."""

import itertools
import math
import random
import xml.etree.ElementTree as ET

import pytest

from ldm.report import (
    BETWEEN,
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    MARKS,
    POINTS,
    RIGHT,
    TALL,
    TOP,
    WIDE,
    WIDTH,
    line_plot,
    log_panels,
    score_panels,
)

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(svg):
    """[(x, y), …] of each line drawn, in pixels."""
    found = ET.fromstring(svg).findall(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in found]


def texts_of(svg):
    return [text.text for text in ET.fromstring(svg).iter(f"{SVG}text")]


def test_points_lie_where_they_should():
    svg = line_plot({"loss": [(0, 1), (5, 3), (10, 2)]}, "step", "value")
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    assert lines_of(svg) == [[(LEFT, bottom), ((LEFT + right) / 2, TOP), (right, (TOP + bottom) / 2)]]
    texts = texts_of(svg)
    assert {"step", "value", "loss", "0", "10", "1", "3"} <= set(texts)


@pytest.mark.parametrize("points", [[(0, 0.05204), (1, 0.05207)], [(0, -1e-9), (1, 3e-9)], [(0, 1e6), (1, 1e6 + 1)]])
def test_the_ticks_of_a_narrow_range_differ(points):
    svg = line_plot({"": points}, "", "")
    ticks = [text.text for text in ET.fromstring(svg).iter(f"{SVG}text") if text.get("text-anchor") == "end"]
    assert len({float(tick) for tick in ticks}) == 6


def test_a_logarithmic_axis():
    svg = line_plot({"loss": [(0, 0.01), (1, 0.1), (2, 1), (3, 0), (4, -1)]}, "x", "y", log=True)
    [(_, low), (_, middle), (_, high)] = lines_of(svg)[0]
    assert middle == pytest.approx((low + high) / 2) and high == TOP
    assert {"0.01", "1"} <= set(texts_of(svg))


def test_several_lines_share_one_scale_and_have_names_and_colours():
    svg = line_plot({f"run {i}": [(0, i), (1, i + 1)] for i in range(10)}, "x", "y")
    lines = lines_of(svg)
    assert len(lines) == 10 and all(a[1][1] == b[0][1] for a, b in itertools.pairwise(lines))
    assert [t for t in texts_of(svg) if t.startswith("run")] == [f"run {i}" for i in range(10)]


def test_names_are_escaped():
    svg = line_plot({"<script>&\"'": [(0, 1)]}, "<x>", "a & b")
    assert {"<script>&\"'", "<x>", "a & b"} <= set(texts_of(svg))
    assert "<script>" not in svg


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0, 1)],
        [(1, 2), (1, 2)],
        [(0, math.nan), (1, math.inf), (2, -math.inf)],
        [(math.nan, 1), (math.inf, 1), (0, 1)],
        [(0, 0), (1, 0)],
        [(0, 1e-300), (1, 1e300)],
        [(-1e9, 5), (1e9, 5.000001)],
    ],
)
def test_odd_numbers(points, log):
    svg = line_plot({"a": points, "b": []}, "x", "y", log)
    assert "nan" not in svg and "inf" not in svg
    for line in lines_of(svg):
        for x, y in line:
            assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_no_lines_at_all():
    assert lines_of(line_plot({}, "x", "y")) == []


@pytest.mark.parametrize("count", [POINTS, POINTS + 1, 100_000])
def test_many_points_are_averaged(count):
    draw = random.Random(0)
    [line] = lines_of(line_plot({"a": [(i, draw.random()) for i in range(count)]}, "x", "y"))
    assert POINTS / 2 <= len(line) <= POINTS
    assert [x for x, _ in line] == sorted(x for x, _ in line)


def test_panels_are_logarithmic_both_ways_and_share_the_axis_of_heights():
    svg = log_panels({"steps": {"a": [(4, 1), (16, 100)]}, "work": {"a": [(1, 10), (2, 10)]}}, "distance", ["a note"])
    first, second, _ = lines_of(svg)  # the last one stands in the legend
    (left, low), (right, high) = first
    assert LEFT < left < right < LEFT + WIDE and TOP < high < low < TOP + TALL
    assert second[0][1] == second[1][1] == pytest.approx((low + high) / 2, abs=0.1)  # 10 is half-way from 1 to 100
    assert LEFT + WIDE + BETWEEN < second[0][0] < second[1][0] < LEFT + 2 * WIDE + BETWEEN
    places = {text.text: float(text.get("x")) for text in ET.fromstring(svg).iter(f"{SVG}text")}
    assert places["4"] == pytest.approx(left, abs=0.1) and places["16"] == pytest.approx(right, abs=0.1)
    assert places["8"] == pytest.approx((left + right) / 2, abs=0.1)
    assert {"steps", "work", "distance", "a note", "a", "1", "10", "100"} <= set(places)


def test_a_name_has_one_colour_and_mark_in_all_panels_and_no_two_share_both():
    names = [f"line {i}" for i in range(14)]
    lines = {name: [(1, i + 1)] for i, name in enumerate(names)}
    root = ET.fromstring(log_panels({"x": lines, "z": dict(reversed(lines.items()))}, "y"))
    marks = root.findall(f"{SVG}polygon")
    looks = [(mark.get("fill"), len(mark.get("points").split())) for mark in marks]
    assert looks[:14] == looks[14:28][::-1] == looks[28::2] and len(marks) == 4 * 14
    assert len({(i % len(COLOURS), i % len(MARKS)) for i in range(14)}) == 14 and len(set(looks[:8])) == 8


@pytest.mark.parametrize(
    "points",
    [[], [(4, 1)], [(0, 1), (1, 0), (-1, 1), (math.nan, 1), (1, math.inf)], [(1e-90, 1e90), (1e90, 1e-90)], [(3, 7)]],
)
def test_odd_numbers_in_panels(points):
    svg = log_panels({"x": {"<a>": points}, "<z>": {}}, "y & z", ["1 < 2"])
    assert "nan" not in svg and "inf" not in svg
    assert {"<a>", "<z>", "y & z", "1 < 2"} <= set(texts_of(svg))
    assert len(texts_of(svg)) < 50  # ticks are few, however long the axis
    for x, y in lines_of(svg)[0]:
        assert LEFT <= x <= LEFT + WIDE and TOP <= y <= TOP + TALL


def test_panels_of_scores_have_axes_of_their_own_and_lines_through_means():
    lines = {"a": [(1, 10), (4, 20), (4, 40)], "b": [(2, 10)]}
    svg = score_panels({"first guess": lines, "error": {"a": [(1, 0.5)], "b": [(2, 0.25)]}}, "work", ["a note"])
    a, b, worse, better = lines_of(svg)[:4]
    assert [x for x, _ in a] == sorted(x for x, _ in a) and len(a) == 2
    assert (
        b[0][0] == pytest.approx((a[0][0] + a[1][0]) / 2, abs=0.1) and b[0][1] == a[0][1]
    )  # 2 is half-way from 1 to 4
    marks = [mark.get("points").split()[0] for mark in ET.fromstring(svg).findall(f"{SVG}polygon")]
    assert len(marks) == 4 + 2 + 2 * 2  # of all points and of the legend
    left = LEFT + WIDE + LEFT  # of the second panel, with room for its own numbers
    assert left < worse[0][0] < better[0][0] < left + WIDE and worse[0][1] < better[0][1]
    assert {"first guess", "error", "work", "a note", "20", "0.25", "0.3"} <= set(texts_of(svg))


@pytest.mark.parametrize(
    "points",
    [[], [(1, 0)], [(1, -1e-9), (2, 3e-9)], [(0, 1), (-1, 1), (1, math.nan), (math.inf, 1)], [(1, 1e98), (2, -1e98)]],
)
def test_odd_numbers_in_panels_of_scores(points):
    svg = score_panels({"<y>": {"<a>": points}, "z": {}}, "x & x")
    assert "nan" not in svg and "inf" not in svg and {"<y>", "z", "<a>", "x & x"} <= set(texts_of(svg))
    assert len(texts_of(svg)) < 50
    for x, y in lines_of(svg)[0]:
        assert LEFT <= x <= LEFT + WIDE and TOP <= y <= TOP + TALL
