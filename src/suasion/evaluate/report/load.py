"""The run folder as records. Any part may be missing; what is there must be well formed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from suasion.core.errors import DataError
from suasion.core.files import read_json, read_json_lines
from suasion.core.summary import Summary
from suasion.evaluate.report.wording import THIN, number

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "merge", "evaluate")
"""In the order they run."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage left behind."""

    name: str
    """One of `STAGES`."""
    manifest: Row = field(default_factory=dict)
    """`manifest.json`; empty while the stage has not finished."""
    metrics: list[Row] = field(default_factory=list)
    """Rows of `metrics.jsonl`."""
    warnings: list[Row] = field(default_factory=list)
    """Rows of `warnings.jsonl`, then the manifest's own: {"step": int | None, "message": str}."""

    def part(self, key: str) -> Row:
        """The manifest's object `key`, empty if absent or null."""
        return _object(self.manifest.get(key) or {}, f"{self.name}/manifest.json: {key}")

    @property
    def result(self) -> Row:
        """The stage's own figures."""
        return self.part("result")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder."""

    name: str
    """The report's title or the recipe's name, else the folder's."""
    recipe: str
    """Text of `recipe.yaml`, empty if there is none."""
    summary: Summary
    """`summary.json`, its gaps filled from the stages' results."""
    stages: dict[str, Stage]
    """Stages that left something, in running order."""
    samples: list[Row]
    """Rows of `ppo/samples.jsonl`."""
    comparisons: list[Row]
    """Rows of `evaluate/comparisons.jsonl`."""

    def result(self, stage: str) -> Row:
        """A stage's figures, empty if it did not run."""
        return self.stages[stage].result if stage in self.stages else {}

    @property
    def compare(self) -> Row:
        """Figures of the comparison before and after PPO, empty if there was none."""
        return _object(self.result("evaluate").get("compare") or {}, "evaluate: result.compare")

    @property
    def level(self) -> str:
        """Confidence level of the intervals in percent, as the evaluation was configured."""
        config = self.stages["evaluate"].part("config") if "evaluate" in self.stages else {}
        return f"{100 * (number(config.get('level')) or 0.95):g}{THIN}%"

    @property
    def names(self) -> tuple[str, str]:
        """What the two models compared are called: the ends of their paths that tell them apart."""
        a, b = (
            PurePosixPath(str(self.compare.get(key) or fallback))
            for key, fallback in (("a", "sft"), ("b", "ppo"))
        )
        return (a.name, b.name) if a.name != b.name else (_end(a), _end(b))

    @property
    def reward(self) -> Row:
        """Figures of the reward model: those of the evaluation, else those of its training."""
        evaluated = self.result("evaluate").get("reward") or {}
        return _object(evaluated, "evaluate: result.reward") or self.result("reward")


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: there is no such folder, nothing of a run is in it, or a file is malformed.
    """
    stages = {stage.name: stage for name in STAGES if (stage := _stage(folder, name))}
    if not stages:
        raise DataError(
            f"{folder}: no stage of a run is in it", "name the folder that was given as --out"
        )
    path = folder / "recipe.yaml"
    recipe = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    saved = folder / "summary.json"
    run = Run(
        name=_title(recipe) or folder.resolve().name,
        recipe=recipe,
        summary=Summary.read(saved) if saved.exists() else Summary(),
        stages=stages,
        samples=_rows(folder / "ppo" / "samples.jsonl"),
        comparisons=_rows(folder / "evaluate" / "comparisons.jsonl"),
    )
    return Run(**{**vars(run), "summary": _completed(run)})


def _title(recipe: str) -> str | None:
    """What the recipe calls the run; None if it does not say, or is no YAML."""
    try:
        values = yaml.safe_load(recipe)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict):
        return None
    report = values.get("report")
    title = report.get("title") if isinstance(report, dict) else None
    found = title or values.get("name")
    return found if isinstance(found, str) else None


def _stage(folder: Path, name: str) -> Stage | None:
    manifest_path = folder / name / "manifest.json"
    manifest = (
        _object(read_json(manifest_path), str(manifest_path)) if manifest_path.exists() else {}
    )
    metrics = _rows(folder / name / "metrics.jsonl")
    warnings = _rows(folder / name / "warnings.jsonl")
    for warning in manifest.get("warnings") or []:
        warnings.append(warning if isinstance(warning, dict) else {"message": str(warning)})
    begun = (folder / name / "begun.json").exists()
    if not manifest and not metrics and not warnings and not begun:
        return None
    return Stage(name=name, manifest=manifest, metrics=metrics, warnings=warnings)


def _completed(run: Run) -> Summary:
    """The summary, with each gap filled from the stage that measured it."""
    evaluated, compare, reward = run.result("evaluate"), run.compare, run.reward
    tuned = run.result("sft") or run.result("pretrain")
    seconds = [number(stage.manifest.get("seconds")) for stage in run.stages.values()]
    known = [value for value in seconds if value is not None]
    measured = {
        "perplexity_before": _first(evaluated, tuned, key="perplexity_before"),
        "perplexity_after": _first(evaluated, tuned, key="perplexity_after"),
        "reward_accuracy": reward.get("accuracy"),
        "reward_accuracy_low": reward.get("accuracy_low"),
        "reward_accuracy_high": reward.get("accuracy_high"),
        "reward_ceiling": evaluated.get("reward_ceiling"),
        "longer_wins_accuracy": reward.get("longer_wins_accuracy"),
        "score_sft": compare.get("score_a"),
        "score_ppo": compare.get("score_b"),
        "gold_sft": compare.get("gold_a"),
        "gold_ppo": compare.get("gold_b"),
        "win_rate": compare.get("win_rate"),
        "win_rate_low": compare.get("win_rate_low"),
        "win_rate_high": compare.get("win_rate_high"),
        "kl": _first(compare, key="kl"),
        "seconds": sum(known) if known else None,
    }
    saved = {entry.name: getattr(run.summary, entry.name) for entry in fields(Summary)}
    return Summary(
        **{
            key: value if value is not None else number(measured[key])
            for key, value in saved.items()
        }
    )


def _end(path: PurePosixPath) -> str:
    return "/".join(path.parts[-2:])


def _first(*results: Row, key: str) -> Any:
    return next((r[key] for r in results if number(r.get(key)) is not None), None)


def _rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [_object(row, f"{path}, line {i}") for i, row in enumerate(read_json_lines(path), 1)]


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: not a JSON object", "run that stage again")
    return value
