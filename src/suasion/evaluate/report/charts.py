"""Charts as inline SVG and positioned HTML: no script, no outside request, readable in print."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from suasion.evaluate.report.markup import Content, Html, join, tag
from suasion.evaluate.report.wording import THIN, count, decimal

WIDTH, HEIGHT = 420.0, 190.0
TOP, RIGHT, BOTTOM = 10.0, 12.0, 24.0
POINTS = 120
"""Most points drawn per curve; more than that are averaged in equal spans of steps."""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    """What it is, for the legend."""
    points: tuple[tuple[float, float | None], ...]
    """(step, value) in rising order; None where the value was not finite."""


@dataclass(frozen=True)
class Point:
    """One drawn point: the mean over the steps `first`..`step`, and the range within them."""

    first: float
    step: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Frame:
    """Maps data to the drawing's coordinates; `marks` are the ticks of the vertical axis."""

    left: float
    x_low: float
    x_high: float
    marks: tuple[float, ...]

    def x(self, step: float) -> float:
        """Horizontal position of a step."""
        share = (step - self.x_low) / (self.x_high - self.x_low)
        return self.left + share * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        """Vertical position of a value."""
        share = (value - self.marks[0]) / (self.marks[-1] - self.marks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)


def line_chart(title: str, series: Sequence[Series], *, unit: str = "", note: str = "") -> Html:
    """Curves over training steps, with axes, the latest values, and a value under the pointer.

    Args:
        title: What is drawn.
        series: One or two curves; those without a finite value are left out.
        unit: Unit of the vertical axis.
        note: One line on how to read it.

    Returns:
        A figure, or nothing if no curve has a finite value.
    """
    drawn = [(s.name, points) for s in series if (points := averaged(s.points))]
    if not drawn:
        return Html()
    frame = _frame([point for _, points in drawn for point in points])
    lost = sum(value is None for s in series for _, value in s.points)
    latest = [known[-1] for s in series if (known := [v for _, v in s.points if v is not None])]
    legend = [
        tag("span", tag("b", decimal(value)), f" {name}", class_=f"key s{i}")
        for i, ((name, _), value) in enumerate(zip(drawn, latest, strict=True))
    ]
    remarks = [note] if note else []
    remarks += [f"{count(lost)} value{'s' * (lost != 1)} not finite, not drawn."] if lost else []
    drawing = tag(
        "svg",
        _axes(frame),
        *(_curve(frame, points, i) for i, (_, points) in enumerate(drawn)),
        *_hovers(frame, drawn, unit),
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        role="img",
        aria_label=f"{title} over training steps",
    )
    heading = tag("span", title, tag("i", f" {unit}") if unit else None, class_="name")
    return tag(
        "figure",
        tag("figcaption", heading, tag("span", join(legend), class_="keys")),
        drawing,
        tag("p", " ".join(remarks), class_="note") if remarks else None,
        class_="chart",
    )


def averaged(points: Iterable[tuple[float, float | None]]) -> list[Point]:
    """At most `POINTS` points, each the mean and range of a span of neighbours; None left out."""
    finite = [(step, value) for step, value in points if value is not None]
    size = math.ceil(len(finite) / POINTS) if finite else 1
    spans = [finite[start : start + size] for start in range(0, len(finite), size)]
    return [
        Point(
            span[0][0],
            span[-1][0],
            math.fsum(value / len(span) for _, value in span),
            min(value for _, value in span),
            max(value for _, value in span),
        )
        for span in spans
    ]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that cover `low`..`high`: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _frame(points: Sequence[Point]) -> Frame:
    low, high = min(p.low for p in points), max(p.high for p in points)
    # A flat curve still needs a scale, and so does one whose range is lost in rounding.
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        margin = abs(high) * 0.1 or 1.0
        low, high = low - margin, high + margin
    marks = ticks(low, high, 5)
    first, last = min(p.first for p in points), max(p.step for p in points)
    if first == last:
        first, last = first - 1, last + 1
    widest = max(len(_label(mark, marks)) for mark in marks)
    # The horizontal axis is named in the corner below the labels and needs its own room.
    return Frame(max(32.0, 14 + 6.4 * widest), first, last, tuple(marks))


def _label(mark: float, marks: Sequence[float]) -> str:
    """A tick's label, with the decimals that tell it from its neighbour."""
    gap = marks[1] - marks[0]
    if max(abs(marks[0]), abs(marks[-1])) >= 1e6 or gap < 1e-4:
        return decimal(mark)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    return f"{mark:,.{digits}f}".replace("-", "\u2212") if abs(mark) > gap / 1e6 else "0"


def _axes(frame: Frame) -> Html:
    parts: list[Html] = []
    for mark in frame.marks:
        y = frame.y(mark)
        kind = "zero" if abs(mark) < 1e-12 else "grid"
        parts.append(tag("line", x1=frame.left, x2=WIDTH - RIGHT, y1=y, y2=y, class_=kind))
        parts.append(
            tag("text", _label(mark, frame.marks), x=frame.left - 7, y=y + 4, text_anchor="end")
        )
    base = HEIGHT - BOTTOM
    inside = [m for m in ticks(frame.x_low, frame.x_high, 5) if frame.x_low <= m <= frame.x_high]
    for mark in (m for m in inside if m == int(m)):
        x = frame.x(mark)
        parts.append(tag("line", x1=x, x2=x, y1=base, y2=base + 4, class_="axis"))
        parts.append(tag("text", count(mark), x=x, y=base + 17, text_anchor="middle"))
    parts.append(tag("line", x1=frame.left, x2=WIDTH - RIGHT, y1=base, y2=base, class_="axis"))
    parts.append(
        tag("text", "step", x=frame.left - 7, y=base + 17, text_anchor="end", class_="unit")
    )
    return join(parts)


def _curve(frame: Frame, points: Sequence[Point], index: int) -> Html:
    line = " ".join(f"{frame.x(p.step):.1f},{frame.y(p.value):.1f}" for p in points)
    band = None
    if any(p.low != p.high for p in points):
        upper = [f"{frame.x(p.step):.1f},{frame.y(p.high):.1f}" for p in points]
        lower = [f"{frame.x(p.step):.1f},{frame.y(p.low):.1f}" for p in reversed(points)]
        band = tag("polygon", points=" ".join(upper + lower), class_=f"band s{index}")
    end = points[-1]
    return join(
        [
            band,
            tag("polyline", points=line, class_=f"line s{index}") if len(points) > 1 else None,
            tag("circle", cx=frame.x(end.step), cy=frame.y(end.value), r=3.2, class_=f"s{index}"),
        ]
    )


def _hovers(frame: Frame, drawn: Sequence[tuple[str, list[Point]]], unit: str) -> list[Html]:
    """One invisible column per step; the pointer over it shows a hair line and the values."""
    at: dict[float, list[tuple[int, str, Point]]] = {}
    for index, (name, points) in enumerate(drawn):
        for point in points:
            at.setdefault(point.step, []).append((index, name, point))
    steps = sorted(at)
    edges = [frame.x(steps[0])]
    edges += [frame.x((a + b) / 2) for a, b in pairwise(steps)]
    edges += [frame.x(steps[-1])]
    suffix = f"{THIN}{unit}" if unit else ""
    columns = []
    for step, (left, right) in zip(steps, pairwise(edges), strict=True):
        first = min(point.first for _, _, point in at[step])
        lines = [
            f"step {count(step)}" if first == step else f"steps {count(first)} to {count(step)}"
        ]
        lines += [f"{name} {decimal(point.value)}{suffix}" for _, name, point in at[step]]
        x = frame.x(step)
        children: list[Content] = [
            tag("title", "\n".join(lines)),
            tag("rect", x=left - 1, y=TOP, width=right - left + 2, height=HEIGHT - BOTTOM - TOP),
            tag("line", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM),
        ]
        children += [
            tag("circle", cx=x, cy=frame.y(point.value), r=3.2, class_=f"s{index}")
            for index, _, point in at[step]
        ]
        columns.append(tag("g", *children, class_="hit"))
    return columns


@dataclass(frozen=True)
class Share:
    """One row of an interval plot."""

    label: str
    """What was measured."""
    value: float
    """The share, in [0, 1]."""
    shown: str
    """The figure as text."""
    low: float | None = None
    """Lower end of its interval."""
    high: float | None = None
    """Upper end of its interval."""
    main: bool = False
    """Whether this is the row the plot is about."""


def share_plot(rows: Sequence[Share], *, middle: str, start: float = 0.0) -> Html:
    """Shares as dots with intervals on one scale up to 100 %, a line at one half.

    Args:
        rows: What to show, top to bottom.
        middle: What one half means ("a coin"), written under the line.
        start: Where the scale begins, below one half.
    """

    def along(share: float) -> float:
        return min(1.0, max(0.0, (share - start) / (1 - start)))

    half = f"left:{along(0.5):.2%}"
    parts: list[Html] = []
    for row in rows:
        band = None
        if row.low is not None and row.high is not None:
            low, high = along(row.low), along(row.high)
            band = tag(
                "i", class_="range", style=f"left:{low:.2%};width:{max(0.0, high - low):.2%}"
            )
        dot = tag("i", class_="dot", style=f"left:{along(row.value):.2%}")
        kind = "share main" if row.main else "share"
        track = tag(
            "span",
            tag("i", class_="half", style=half),
            band,
            dot,
            class_="track",
            aria_hidden="true",
        )
        label, value = (
            tag("span", row.label, class_="label"),
            tag("span", row.shown, class_="value"),
        )
        parts.append(tag("div", label, track, value, class_=kind))
    ends = [
        tag("span", f"{100 * start:.0f}{THIN}%"),
        tag("span", f"50{THIN}% {middle}", class_="at", style=half),
        tag("span", f"100{THIN}%"),
    ]
    scale = tag("div", tag("span"), tag("span", *ends, class_="ends"), class_="share scale")
    return tag("div", *parts, scale, class_="shares")


def sorted_bars(values: Sequence[float], marked: Sequence[int]) -> Html:
    """Every value as a thin bar from the zero line, smallest first.

    Args:
        values: In rising order.
        marked: Positions of the bars that are shown in full below.
    """
    top, bottom = max([*values, 0.0]), min([*values, 0.0])
    span = (top - bottom) or 1.0
    wide = 1000.0 / len(values)
    bars = []
    for index, value in enumerate(values):
        kind = "gain" if value > 0 else "loss" if value < 0 else "same"
        if index in marked:
            kind += " marked"
        high = 100 * abs(value) / span
        y = 100 * (top - max(value, 0.0)) / span
        gap = min(1.0, wide * 0.2)
        bars.append(
            tag("rect", x=index * wide, y=y, width=wide - gap, height=max(high, 0.6), class_=kind)
        )
    zero = 100 * top / span
    line = tag("line", x1=0, x2=1000, y1=zero, y2=zero, class_="zero")
    return tag(
        "svg", *bars, line, viewBox="0 0 1000 100", preserveAspectRatio="none", class_="bars",
        role="img", aria_label="change of every comparison, smallest first",
    )  # fmt: skip
