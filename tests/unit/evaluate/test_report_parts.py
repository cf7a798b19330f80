"""The pieces of the report: what is drawn is what was measured, what is shown follows a rule."""

from __future__ import annotations

import math
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suasion.evaluate.report.charts import (
    POINTS,
    Series,
    Share,
    averaged,
    line_chart,
    share_plot,
    sorted_bars,
    ticks,
)
from suasion.evaluate.report.markup import Html, join, tag, text
from suasion.evaluate.report.samples import changes, evenly, passage, picks
from suasion.evaluate.report.wording import count, decimal, duration, percent, signed


def polyline(svg: str) -> list[tuple[float, float]]:
    """Corners of the first curve of a drawing."""
    found = re.search(r'<polyline points="([^"]+)"', svg)
    assert found
    return [(float(x), float(y)) for x, y in (p.split(",") for p in found[1].split())]


def test_a_curve_is_drawn_to_scale() -> None:
    """Positions are affine in step and value, upwards."""
    steps, values = [3, 5, 10, 24], [0.7, -1.3, 2.9, 0.1]
    svg = line_chart("x", [Series("y", tuple(zip(steps, values, strict=True)))])
    corners = polyline(svg)
    (x0, y0), (x2, y2) = corners[0], corners[2]
    for step, value, (x, y) in zip(steps, values, corners, strict=True):
        assert x == pytest.approx(x0 + (step - 3) / (10 - 3) * (x2 - x0), abs=0.15)
        assert y == pytest.approx(y0 + (value - 0.7) / (2.9 - 0.7) * (y2 - y0), abs=0.15)
    assert y2 < y0
    assert svg.count("<title>") == 4
    assert "step 24\ny 0.10" in svg


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.5] * 3, [-1e-300, 1e-300], [1e15, 1e15 + 1], [-1e300, 1e300], [1e-9, 3e-9, 2e-9]],
)
def test_any_finite_curve_stays_inside_the_drawing(values: list[float]) -> None:
    """Flat, single, tiny and enormous curves have finite coordinates inside the frame."""
    svg = line_chart("x", [Series("y", tuple(enumerate(values)))])
    heights = [float(y) for y in re.findall(r'cy="([^"]+)"', svg)]
    assert heights
    assert all(0 <= y <= 190 for y in heights)
    assert not re.search("nan|inf", svg)


def test_a_curve_without_a_finite_value_is_not_drawn() -> None:
    """Not an empty frame."""
    assert line_chart("x", [Series("y", ((0, None),)), Series("z", ())]) == ""


def test_the_figure_beside_a_long_curve_is_the_latest_value() -> None:
    """Not the mean of the last span, which is what is drawn."""
    values: list[float | None] = [float(step) for step in range(1000)]
    svg = line_chart("x", [Series("y", (*enumerate(values), (1000, None)))])
    assert "<b>999</b>" in svg
    assert len(polyline(svg)) < POINTS


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=700))
def test_averaging_keeps_the_mean_and_the_range(values: list[float]) -> None:
    """Weighted by the steps in each span, nothing is lost."""
    points = averaged(enumerate(values))
    size = math.ceil(len(values) / POINTS)
    assert len(points) == math.ceil(len(values) / size) <= POINTS
    weights = [point.step - point.first + 1 for point in points]
    total = math.fsum(w * p.value for w, p in zip(weights, points, strict=True))
    assert total == pytest.approx(math.fsum(values), rel=1e-9, abs=1e-4)
    assert max(point.high for point in points) == max(values)
    assert min(point.low for point in points) == min(values)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_cover_the_range_in_round_steps(low: float, span: float, most: int) -> None:
    """A step of 1, 2 or 5 times a power of ten, and not many more marks than asked for."""
    high = low + span
    marks = ticks(low, high, most)
    step = marks[1] - marks[0]
    slack = 1e-6 * step + 1e-9 * max(abs(low), abs(high))
    assert marks[0] <= low + slack
    assert marks[-1] >= high - slack
    assert len(marks) <= most + 2


def test_shares_are_placed_on_their_scale() -> None:
    """Half of a scale from 40 % on, and clamped to it."""
    svg = share_plot([Share("a", 0.7, "70", 0.4, 1.3)], middle="a coin", start=0.4)
    assert 'class="dot" style="left:50.00%"' in svg
    assert 'class="range" style="left:0.00%;width:100.00%"' in svg
    assert 'class="half" style="left:16.67%"' in svg


def test_bars_hang_from_the_zero_line() -> None:
    """Heights are proportional to the change."""
    svg = sorted_bars([-1.0, 0.0, 3.0], [0])
    heights = [float(h) for h in re.findall(r'height="([^"]+)"', svg)]
    assert heights == [25.0, 0.6, 75.0]
    assert re.findall(r'class="([a-z ]+)"></rect>', svg) == ["loss marked", "same", "gain"]


def test_comparisons_are_picked_by_rule() -> None:
    """Largest gain, median and largest loss of a shuffled file, against a plain sort."""
    draw = random.Random(4)  # noqa: S311  a shuffle, not a secret
    rows = [
        {"query": i, "score_a": 0.3, "score_b": 0.3 + i / 7, "gold_a": 1} for i in range(-20, 31)
    ]
    draw.shuffle(rows)
    judged, ordered = changes(rows)
    assert judged == "score"
    shown = [(pick.label, ordered[pick.position][1]["query"]) for pick in picks(len(ordered))]
    assert shown == [("Largest gain", 30), ("Median", 5), ("Largest loss", -20)]


@pytest.mark.parametrize(("total", "positions"), [(0, []), (1, [0]), (2, [1, 0]), (3, [2, 1, 0])])
def test_no_comparison_is_shown_twice(total: int, positions: list[int]) -> None:
    """However few there are."""
    assert [pick.position for pick in picks(total)] == positions


def test_gold_decides_only_where_every_row_has_it() -> None:
    """One missing gold score sends all back to the reward score; broken rows are left out."""
    gold = {"score_a": 0.0, "score_b": 1.0, "gold_a": 2.0, "gold_b": -1.0}
    assert changes([gold, gold])[0] == "gold"
    assert changes([gold, gold | {"gold_b": None}])[0] == "score"
    assert changes([{"score_a": math.nan, "score_b": 1.0}]) == ("score", [])


def test_moments_are_spread_evenly() -> None:
    """First and last included."""
    assert evenly([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 4) == [0.0, 2.0, 4.0, 6.0]
    assert evenly([7.0], 4) == [7.0]


def test_a_passage_is_shown_as_written() -> None:
    """Leading newlines, indentation and fences survive; nothing is interpreted."""
    assert passage("\n\n  ```py\n<b>*x*</b>") == (
        '<pre dir="auto" class="passage">\n\n\n  ```py\n&lt;b&gt;*x*&lt;/b&gt;</pre>'
    )
    assert "(empty)" in passage(None)
    assert "(empty)" in passage(" \n")


def test_only_markup_is_not_escaped() -> None:
    """Strings are, in content and in attributes; elements are not."""
    inner = tag("b", "1 < 2")
    assert tag("p", inner, None, "&", title='"') == ('<p title="&quot;"><b>1 &lt; 2</b>&amp;</p>')
    assert join(["<", inner], "|") == "&lt;|<b>1 &lt; 2</b>"
    assert text(text("&")) == "&amp;"
    assert text("a\x00\ud83db\tc\n") == "a\ufffd\ufffdb\tc\n"
    assert isinstance(inner, Html)
    # Joining by hand falls back to a plain string, which is escaped again.
    assert tag("p", inner + "<i>") == "<p>&lt;b&gt;1 &amp;lt; 2&lt;/b&gt;&lt;i&gt;</p>"


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (decimal(0), "0"),
        (decimal(-0.0999999), "\u22120.10"),
        (decimal(0.0619), "0.062"),
        (decimal(71.238), "71.2"),
        (decimal(123456.7), "123,457"),
        (decimal(3.1e-6), "3.1\u202f\u00d7\u202f10\u207b\u2076"),
        (decimal(math.nan), "\u2013"),
        (decimal("7"), "\u2013"),
        (decimal(-1e308), "\u2013"),
        (decimal(10**400), "\u2013"),
        (signed(0.65), "+0.65"),
        (signed(-0.65), "\u22120.65"),
        (count(14377), "14,377"),
        (percent(0.6328), "63.3\u202f%"),
        (duration(4.21), "4.2\u202fs"),
        (duration(754.4), "12\u202fmin 34\u202fs"),
        (duration(59.97), "1\u202fmin 00\u202fs"),
        (duration(7199.7), "2\u202fh 00\u202fmin"),
        (duration(None), "\u2013"),
    ],
)
def test_numbers_read_well(shown: str, expected: str) -> None:
    """Rounded, grouped, with units, and a dash where there is none."""
    assert shown == expected
