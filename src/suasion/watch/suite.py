"""All checks by name, run and shown."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from suasion.core.errors import CheckError, ConfigError, TrainingError
from suasion.watch import judge, policy, roles, update
from suasion.watch.finding import Finding
from suasion.watch.subject import Subject

Check = Callable[[Subject], Finding]

CHECKS: dict[str, Check] = {
    "ratio": update.ratio,
    "reference": policy.reference,
    "roles": roles.roles,
    "sampler": policy.sampler,
    "stop": policy.stop,
    "templates": judge.templates,
    "reward": judge.reward,
    "padding": policy.padding,
    "modes": policy.modes,
    "gradients": update.gradients,
    "packing": policy.packing,
    "label": judge.label,
    "head": judge.head,
}
"""Every check, in the order they run: those a policy stage always runs come first."""

QUICK = (
    "ratio",
    "reference",
    "roles",
    "sampler",
    "stop",
    "templates",
    "reward",
    "padding",
    "gradients",
)
"""What a policy stage runs by itself: no model is loaded or saved for them."""


def chosen(names: Iterable[str]) -> tuple[str, ...]:
    """The names, all known.

    Raises:
        ConfigError: there is no check of that name; the nearest one is suggested.
    """
    found = tuple(names)
    for name in found:
        if name not in CHECKS:
            close = difflib.get_close_matches(name, CHECKS, n=1)
            raise ConfigError(
                f"there is no check {name!r}",
                f"did you mean {close[0]}?" if close else f"the checks are {', '.join(CHECKS)}",
            )
    return found


def run_checks(
    subject: Subject,
    names: Iterable[str] = tuple(CHECKS),
    *,
    console: Console,
    only_report: bool = False,
    brief: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Finding]:
    """Run checks and show what they found. Weights and random states are left as they were.

    Args:
        subject: What is looked at.
        names: Which checks.
        console: Gets the table, and below it every fault with its cause and remedy.
        only_report: Do not raise.
        brief: One line instead of the table where there is no fault.
        clock: Seconds from an arbitrary zero.

    Returns:
        One finding for each name.

    Raises:
        CheckError: faults were found; lists them all.
        ConfigError: a name is unknown.
    """
    findings, seconds = [], []
    for name in chosen(names):
        began = clock()
        with torch.random.fork_rng():
            findings.append(_looked(name, subject))
        seconds.append(clock() - began)
    faults = [finding for finding in findings if not finding.ok]
    if faults or not brief:
        console.print(table(findings, seconds))
    else:
        listed = ", ".join(finding.name for finding in findings if finding.applies)
        console.print(f"  checks ok in {sum(seconds):.1f} s: {listed}", highlight=False)
    if faults and not only_report:
        raise CheckError(
            "\n".join([f"{_count(len(faults))} that would ruin the run:", *map(explain, faults)]),
            "mend them; to run nonetheless set ppo.checks to report",
        )
    for fault in faults:
        console.print(explain(fault), style="yellow", markup=False, highlight=False)
    return findings


def _looked(name: str, subject: Subject) -> Finding:
    """What a check found; where a role refused to compute, that is what it found."""
    try:
        return CHECKS[name](subject)
    except TrainingError as error:
        return Finding(
            name,
            ok=False,
            what=error.what,
            likely_cause="code that switches adapters by itself, or between a forward pass and its "
            "backward pass",
            fix=error.fix,
        )


def table(findings: list[Finding], seconds: list[float]) -> Table:
    """One row for each check: outcome, figures, seconds."""
    shown = Table(title="Checks before the run", title_justify="left", title_style="bold")
    for heading in ("check", "", "measured"):
        shown.add_column(heading)
    shown.add_column("s", justify="right")
    for finding, took in zip(findings, seconds, strict=True):
        state = "[green]ok[/]" if finding.ok else "[bold red]FAULT[/]"
        figures = "  ".join(f"{name} {value:.3g}" for name, value in finding.measured.items())
        if finding.ok and not finding.applies:
            state, figures = "-", finding.what
        shown.add_row(finding.name, state, escape(figures), f"{took:.1f}")
    return shown


def explain(fault: Finding) -> str:
    """A fault in three lines: what, why, what to do."""
    lines = [f"  {fault.name}: {fault.what}", f"    likely cause: {fault.likely_cause}"]
    return "\n".join([*lines, f"    fix: {fault.fix}"])


def _count(faults: int) -> str:
    return "1 fault" if faults == 1 else f"{faults} faults"
