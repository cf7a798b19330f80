"""Small diagrams side by side as one SVG file that stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from suasion.evaluate.report.charts import ticks

WIDTH, HEIGHT = 300, 210
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 34
INKS = ("#1f6f8b", "#c2571a")
GREY, INK = "#c9ced6", "#24292f"
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One diagram; both axes are linear and begin at zero."""

    title: str
    """What goes up, and its unit."""
    axis: str
    """What goes to the right."""
    curves: Mapping[str, Points]
    """Points by name; a curve of the same name has the same ink in every panel."""


def panels(rows: Sequence[Sequence[Panel]]) -> str:
    """The panels as a grid, under one legend."""
    names = list(dict.fromkeys(name for row in rows for panel in row for name in panel.curves))
    inks = dict(zip(names, INKS, strict=False))
    width, height = WIDTH * max(map(len, rows)), HEIGHT * len(rows) + 28
    parts = [f'<rect width="{width}" height="{height}" fill="#ffffff"/>']
    place = LEFT
    for name, ink in inks.items():
        parts.append(f'<path d="M{place} 16h16" stroke="{ink}" stroke-width="2"/>')
        parts.append(_text(place + 21, 20, name))
        place += 44 + 7 * len(name)
    for y, row in enumerate(rows):
        for x, panel in enumerate(row):
            inner = "\n".join(_panel(panel, inks))
            parts.append(f'<g transform="translate({x * WIDTH} {28 + y * HEIGHT})">\n{inner}\n</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'aria-label="Seconds and memory as batch, response and vocabulary grow" '
        'font-family="sans-serif" font-size="11">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _panel(panel: Panel, inks: Mapping[str, str]) -> list[str]:
    points = [point for curve in panel.curves.values() for point in curve]
    parts = [_text(LEFT, 16, panel.title, bold=True)]
    if not points:
        return [*parts, _text(LEFT, TOP + 20, "not measured")]
    across = max(x for x, _ in points)
    marks = ticks(0.0, max(y for _, y in points), 4)

    def at(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + point[0] / across * (WIDTH - LEFT - RIGHT)
        return x, TOP + (1 - point[1] / marks[-1]) * (HEIGHT - TOP - BOTTOM)

    for mark in marks:
        y = at((0.0, mark))[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GREY}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{mark:.3g}", anchor="end"))
    for place in sorted({x for x, _ in points}):
        if place >= across / 8:  # those further left would be written over each other
            x = at((place, 0.0))[0]
            parts.append(_text(x, HEIGHT - BOTTOM + 15, _short(place), anchor="middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 5, panel.axis, anchor="end"))
    for name, curve in panel.curves.items():
        placed = [at(point) for point in sorted(curve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        ink = inks[name]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{ink}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{ink}"/>' for x, y in placed]
    return parts


def _short(number: float) -> str:
    return f"{number / 1024:.0f}k" if number >= 1024 else f"{number:.0f}"


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}"{weight}>'
        f"{escape(text)}</text>"
    )
