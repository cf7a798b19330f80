"""The page: every section there is something for, put into the template."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from string import Template

from suasion.core.files import write_text
from suasion.evaluate.report import curves, samples, sections
from suasion.evaluate.report.load import Run, load_run
from suasion.evaluate.report.markup import Html, join, tag, text
from suasion.evaluate.report.verdict import verdict


def write_report(run: Path, out: Path) -> Path:
    """Write one HTML page about a run.

    The page asks the network for nothing, shows what is there and leaves out what is not, and is
    the same to the byte for the same folder.

    Args:
        run: The run folder.
        out: The page to write.

    Returns:
        `out`.

    Raises:
        DataError: `run` holds no run, or a file in it is malformed.
        StorageError: the disk refused.
    """
    write_text(out, render(load_run(run)))
    return out


def render(run: Run) -> str:
    """The page as text."""
    package = files("suasion.evaluate.report")
    template = Template(package.joinpath("template.html").read_text(encoding="utf-8"))
    shown = [(key, title, intro, body) for key, title, intro, body in _parts(run) if body]
    return template.substitute(
        style=package.joinpath("style.css").read_text(encoding="utf-8"),
        title=text(f"{run.name} · suasion"),
        name=text(run.name),
        verdict=text(verdict(run)),
        key_figure=sections.key_figure(run) or "",
        links=join(tag("a", title, href=f"#{key}") for key, title, _, _ in shown),
        sections=join(_section(*part) for part in shown),
    )


def _parts(run: Run) -> list[tuple[str, str, str, Html | None]]:
    """(anchor, title, introduction, content) of every section, in reading order."""
    drawn = (
        "The figure beside a title is the latest value; point at a curve to read any other. "
        "Of a long run each point is the mean of neighbouring steps, the band their range."
    )
    share = "Share of held-out pairs in which the chosen answer scores higher."
    fixed = "These prompts were set aside before the first step; the moments are evenly spread."
    losses = ("Training before PPO", "") if "ppo" in run.stages else ("Training", drawn)
    return [
        ("figures", "Figures", "", sections.figures(run)),
        ("caution", "Read with care", "", sections.caution(run)),
        ("path", "Path of the run", "", sections.stages(run)),
        ("samples", "Before and after", "", samples.comparisons(run)),
        ("ppo", "PPO", drawn, curves.policy_curves(run)),
        ("progress", "The same prompts through training", fixed, samples.progress(run)),
        ("reward", "Reward model", share, sections.reward_card(run)),
        ("training", *losses, curves.training_curves(run)),
        ("evaluation", "Evaluation in full", "", sections.evaluation(run)),
        ("configuration", "Configuration", "", sections.configuration(run)),
        ("provenance", "Provenance", "", sections.provenance(run)),
    ]


def _section(key: str, title: str, intro: str, body: Html) -> Html:
    opening = tag("p", intro, class_="intro") if intro else None
    return tag("section", tag("h2", title), opening, body, id=key)
