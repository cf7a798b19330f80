"""A plan on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suasion.plan.records import PARTS, Plan, RolePlan, StagePlan, Verdict

NAMES = {
    "adapters": "adapt.",
    "optimizer": "optim.",
    "gradients": "grad.",
    "kv_cache": "cache",
    "activations": "activ.",
    "process": "libs",
}
"""Short, so that a table is as wide as a terminal."""
LARGE = 1e10
"""Peaks from here on are told in GB."""


def size(count: float) -> str:
    """Bytes as people say them: 21.2 GB, 553 MB."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 5e5 else ("-" if count < 1 else "<1 MB")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.1f} {name}"
    return f"{seconds:.1f} s"


def show(plan: Plan, console: Console) -> None:
    """Print a plan: for each stage its roles, its phases, and what follows from them."""
    console.print(
        f"[bold]{escape(plan.recipe)}[/] on {escape(plan.card)}, {size(plan.memory)}; "
        f"{plan.flops / 1e12:.3g} TFLOP/s {plan.flops_from}",
        highlight=False,
    )
    for stage in plan.stages:
        verdict = plan.verdicts[stage.name]
        console.print()
        console.print(_roles(stage))
        console.print(_phases(stage))
        _say(plan, stage, verdict, console)


def _roles(stage: StagePlan) -> Table:
    table = _table(f"{stage.name}: who is in memory")
    table.add_column("role")
    for name in ("weights", "adapters", "gradients", "optimizer"):
        table.add_column(name, justify="right")
    table.add_column("")
    for role in stage.roles:
        table.add_row(
            role.name,
            _weights(role),
            *(size(count) for count in (role.adapters, role.gradients, role.optimizer)),
            role.note,
        )
    return table


def _weights(role: RolePlan) -> str:
    held = sorted(role.weights.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{size(count)} {kind}" for kind, count in held if count >= 1) or "-"


def _phases(stage: StagePlan) -> Table:
    """One row per phase; parts that are nowhere have no column."""
    unit, name = (1e9, "GB") if stage.peak.total >= LARGE else (1e6, "MB")
    shown = [p for p in PARTS if any(phase.parts[p] >= unit / 20 for phase in stage.phases)]
    table = _table(f"{stage.name}: at most, in {name}")
    table.add_column("phase", no_wrap=True)
    for part in shown:
        table.add_column(NAMES.get(part, part), justify="right", no_wrap=True)
    table.add_column("total", justify="right", style="bold", no_wrap=True)
    for phase in stage.phases:
        cells = [phase.parts[part] / unit for part in shown] + [phase.total / unit]
        table.add_row(
            phase.name + (" (host)" if phase.on_host else " *" if phase is stage.peak else ""),
            *(f"{cell:,.1f}" if unit == 1e9 else f"{cell:,.0f}" for cell in cells),
        )
    return table


def _table(title: str) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=(0, 1, 0, 0)
    )


def _say(plan: Plan, stage: StagePlan, verdict: Verdict, console: Console) -> None:
    peak = stage.peak
    fits = "[green]fits[/]" if verdict.fits else "[red]does not fit[/]"
    lines = [f"{fits}: {size(peak.total)} of {size(plan.memory)} in its {peak.name} phase"]
    if verdict.seconds is not None and stage.work is not None:
        steps = stage.work.steps
        unit = f"{steps} steps" if steps and steps > 1 else ("in all" if steps else "a step")
        lines.append(f"time: about {duration(verdict.seconds)} ({unit})")
    if verdict.rooms:
        rooms = ", ".join(
            f"{room.key} {room.largest:,}" if room.largest else f"{room.key} none"
            for room in verdict.rooms
        )
        lines.append(f"largest that fits, one at a time: {rooms}")
    for number, change in enumerate(verdict.changes, start=1):
        lines.append(
            f"{number}. {change.key}: {change.value}  -> {size(change.peak)}  ({change.effect})"
        )
    if stage.assumed:
        lines.append(f"taken for granted: {'; '.join(stage.assumed)}")
    for line in lines:
        console.print(f"  {line}", highlight=False)
