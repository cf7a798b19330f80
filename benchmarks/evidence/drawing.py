"""Curves as an SVG file that stands alone: readable on any background, no font or script needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from suasion.evaluate.report.charts import ticks

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 44, 40
INKS = ("#1f6f8b", "#c2571a", "#6a4c93", "#3d7a3a")
GREY, INK = "#c9ced6", "#24292f"
NOTHING = 1e-3
"""Share of the axis below which a negative value is not seen."""


@dataclass(frozen=True)
class Curve:
    """One curve; its points are evenly spaced steps from `first` on."""

    name: str
    values: Sequence[float]
    first: int = 0


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare the curves with."""

    name: str
    value: float


def drawing(title: str, curves: Sequence[Curve], levels: Sequence[Level] = (), *, unit: str) -> str:
    """The curves over iterations, with a legend of lines above them.

    Args:
        title: What is drawn.
        curves: At most four.
        levels: Dashed lines.
        unit: Of the vertical axis.
    """
    everything = [value for curve in curves for value in curve.values]
    everything += [level.value for level in levels]
    low, high = min(*everything, 0.0), max(*everything, 0.0)
    # A KL of -1e-9 is no reason for a negative half.
    marks = ticks(low if -low > NOTHING * (high - low) else 0.0, high, 5)
    last = max(curve.first + len(curve.values) - 1 for curve in curves)

    def x(step: float) -> float:
        return LEFT + step / last * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + (marks[-1] - value) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for mark in marks:
        parts.append(_line(LEFT, y(mark), WIDTH - RIGHT, y(mark), GREY))
        parts.append(_text(LEFT - 8, y(mark) + 4, f"{mark:.4g}", anchor="end"))
    parts += [
        _text(x(step), HEIGHT - BOTTOM + 18, f"{step:.4g}", anchor="middle")
        for step in ticks(0, last, 6)
        if step <= last
    ]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, "iteration", anchor="end"))
    place = float(LEFT)
    for curve, ink in zip(curves, INKS, strict=False):
        points = " ".join(
            f"{x(curve.first + at):.1f},{y(value):.1f}" for at, value in enumerate(curve.values)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{ink}" stroke-width="1.8"/>')
        parts.append(_line(place, TOP - 14, place + 16, TOP - 14, ink))
        parts.append(_text(place + 21, TOP - 10, curve.name))
        place += 40 + 7 * len(curve.name)
    for level in levels:
        parts.append(_line(LEFT, y(level.value), WIDTH - RIGHT, y(level.value), INK, dashed=True))
        parts.append(_text(WIDTH - RIGHT, y(level.value) + 14, level.name, anchor="end"))
    parts.append(_text(LEFT, 18, f"{title} ({unit})", bold=True))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="12">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float, ink: str, *, dashed: bool = False) -> str:
    width = 1 if ink in {GREY, INK} else 1.8
    dash = ' stroke-dasharray="4 4"' if dashed else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
        f'stroke="{ink}" stroke-width="{width}"{dash}/>'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}"{weight} '
        f'stroke="#ffffff" stroke-width="3" paint-order="stroke">'
        f"{escape(text)}</text>"
    )
