"""The picture of docs/memory.md: what each phase of a plan holds, as stacked bars.

suasion plan RECIPE.yaml --card 24GiB --json plan.json
python -m benchmarks.memory.picture plan.json docs/memory.svg
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from suasion.core.files import read_json, write_text
from suasion.plan.records import PARTS

COLOURS = dict(
    zip(
        PARTS,
        (
            "#33508c",
            "#7a9cd6",
            "#b4762c",
            "#e0a458",
            "#3d8c6a",
            "#8cc7a5",
            "#9a7fb5",
            "#c9543f",
            "#9a9a9a",
        ),
        strict=True,
    )
)
NAMES = {"kv_cache": "KV cache", "process": "libraries"}
LEFT, WIDTH, ROW, BAR = 190, 620, 24, 16


def drawn(plan: dict[str, Any]) -> str:
    """The bars of every phase on the device, and a line where the card ends."""
    rows = [
        (f"{stage['name']}: {phase['name']}", phase)
        for stage in plan["stages"]
        for phase in stage["phases"]
        if not phase["on_host"]
    ]
    most = 1.05 * max(plan["memory"], *(phase["total"] for _, phase in rows))
    used = [part for part in PARTS if any(phase["parts"][part] for _, phase in rows)]
    height = ROW * len(rows) + 70
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 80} {height}">',
        "<style>text {font: 12px sans-serif}</style>",
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    for number, (name, phase) in enumerate(rows):
        y = 20 + ROW * number
        x = float(LEFT)
        lines.append(f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>')
        for part in used:
            width = WIDTH * phase["parts"][part] / most
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" '
                f'fill="{COLOURS[part]}"/>'
            )
            x += width
        lines.append(f'<text x="{x + 5:.1f}" y="{y + 12}">{phase["total"] / 1e9:.1f} GB</text>')
    end = LEFT + WIDTH * plan["memory"] / most
    bottom = 20 + ROW * len(rows)
    lines.append(
        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="14" y2="{bottom}" stroke="#c00" '
        'stroke-dasharray="4 3"/>'
    )
    lines.append(
        f'<text x="{end:.1f}" y="11" text-anchor="middle" fill="#c00">{escape(plan["card"])}</text>'
    )
    x = float(LEFT)
    for part in used:
        lines.append(
            f'<rect x="{x:.0f}" y="{bottom + 18}" width="11" height="11" fill="{COLOURS[part]}"/>'
        )
        name = NAMES.get(part, part)
        lines.append(f'<text x="{x + 15:.0f}" y="{bottom + 28}">{name}</text>')
        x += 26 + 6.5 * len(name)
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    write_text(Path(sys.argv[2]), drawn(read_json(Path(sys.argv[1]))))
