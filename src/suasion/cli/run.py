"""A recipe from beginning to end."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from suasion.config.recipe import STAGES
from suasion.config.schema import Recipe
from suasion.core.errors import ConfigError
from suasion.core.files import write_text
from suasion.core.memory import reuse_memory
from suasion.core.ranks import ALONE, Ranks
from suasion.core.summary import Summary, summary_table


def run_recipe(recipe: Recipe, console: Console, ranks: Ranks = ALONE) -> Summary:
    """Run the stages of a resolved recipe; finished ones are skipped.

    Writes recipe.yaml (resolved), one folder per stage, summary.json and report/index.html.

    Args:
        recipe: Every input of a stage is named in it.
        console: For progress; should be silent in all processes but the first.
        ranks: The processes that run it.

    Raises:
        SuasionError: whatever stopped a stage, or there is none, or an input is missing.
    """
    from suasion.cli.inputs import look_for_inputs
    from suasion.cli.stages import run_stage

    configs = {stage: getattr(recipe, stage) for stage in STAGES if stage != "report"}
    configs = {stage: config for stage, config in configs.items() if config is not None}
    if not configs:
        raise ConfigError("the recipe names no stage", f"give it some of {', '.join(STAGES)}")
    set_up_processor(recipe.threads)
    out = Path(recipe.out)
    ranks.share(lambda: look_for_inputs(configs, out))
    stored: dict[str, dict[str, Any]] = {}
    if ranks.first:
        write_text(out / "recipe.yaml", yaml.safe_dump(plain(asdict(recipe)), sort_keys=False))
    for stage, config in configs.items():
        stored[stage] = run_stage(
            stage, config, out / stage, seed=recipe.seed, console=console, ranks=ranks
        )
    summary = summarise(stored)
    if not ranks.first:
        return summary
    summary.write(out / "summary.json")
    console.print(summary_table(summary))
    if recipe.report is not None:
        from suasion.evaluate.report import write_report

        page = write_report(out, out / "report" / "index.html")
        console.print(f"report: {page}", highlight=False)
    return summary


def summarise(stored: dict[str, dict[str, Any]]) -> Summary:
    """The run's figures under plain keys, from the manifests of its stages."""
    results = {stage: manifest["result"] for stage, manifest in stored.items()}
    evaluation = results.get("evaluate", {})
    card = evaluation.get("reward") or results.get("reward", {})
    compared = evaluation.get("compare", {})
    first = results.get("pretrain", {})
    return Summary(
        perplexity_before=evaluation.get("perplexity_before", first.get("perplexity_before")),
        perplexity_after=evaluation.get("perplexity_after", first.get("perplexity_after")),
        reward_accuracy=card.get("accuracy"),
        reward_accuracy_low=card.get("accuracy_low"),
        reward_accuracy_high=card.get("accuracy_high"),
        reward_ceiling=evaluation.get("reward_ceiling"),
        longer_wins_accuracy=card.get("longer_wins_accuracy"),
        score_sft=compared.get("score_a"),
        score_ppo=compared.get("score_b"),
        gold_sft=compared.get("gold_a"),
        gold_ppo=compared.get("gold_b"),
        win_rate=compared.get("win_rate"),
        win_rate_low=compared.get("win_rate_low"),
        win_rate_high=compared.get("win_rate_high"),
        kl=compared.get("kl"),
        seconds=sum(manifest["seconds"] for manifest in stored.values()),
    )


def set_up_processor(threads: int | None) -> None:
    """Use `threads` processor threads, and memory again that was used before; say nothing of it."""
    reuse_memory()
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value
