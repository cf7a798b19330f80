"""`suasion plan`: a recipe, or a model alone, against a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suasion.config.load import merged, parse_overrides, validate
from suasion.config.recipe import load_recipe, resolve, with_template
from suasion.config.schema import Recipe
from suasion.core.errors import ConfigError, ModelError
from suasion.plan.advice import changes_for, rooms_of
from suasion.plan.cards import Card
from suasion.plan.clock import seconds_of, throughput
from suasion.plan.planner import PLANNED, Planner, read_config
from suasion.plan.records import Plan, Verdict


def recipe_of(source: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file; of a model alone, one with every stage from it and nothing else set.

    Args:
        source: A recipe file, a model folder, or a Hub name.
        overrides: As of `suasion run`.

    Raises:
        ConfigError: a mistake in the recipe or the overrides, or no such file.
        ModelError: no such model.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        return load_recipe(path, overrides)
    if not path.is_dir() and (path.exists() or source.startswith((".", "/", "~"))):
        raise ModelError(
            f"{source}: no such recipe (it ends in .yaml) and no such model folder",
            "check the path",
        )
    if not (path / "adapter_config.json").is_file():
        read_config(source)
    alone: dict[str, Any] = {
        "name": path.name,
        "out": "runs/plan",
        "sft": {"model": source, "data": "data"},
        "reward": {"data": "data"},
        "ppo": {"data": "data"},
        "evaluate": {"data": "data"},
    }
    values = merged(alone, parse_overrides(overrides))
    return resolve(with_template(validate(Recipe, values, "the options")))


def plan(recipe: Recipe, card: Card, *, flops: float | None = None) -> Plan:
    """Plan every stage with a model.

    Args:
        recipe: Resolved.
        card: Where it would run.
        flops: Operations per second to reckon with; None: the card's, or measured here.

    Raises:
        ConfigError: no stage has a model, or two options do not go together.
        ModelError: the configuration of the first model cannot be found.
    """
    configs: Mapping[str, Any] = {
        name: config for name in PLANNED if (config := getattr(recipe, name)) is not None
    }
    if not configs:
        raise ConfigError(
            f"{recipe.name}: no stage of it has a model", f"plan knows {', '.join(PLANNED)}"
        )
    planner = Planner(card, recipe)
    speed, told = throughput(card, flops)
    stages = {name: planner.stage(name, config) for name, config in configs.items()}
    verdicts = {}
    for name, stage in stages.items():
        fits = stage.peak.total <= card.memory
        verdicts[name] = Verdict(
            fits,
            rooms_of(planner, name, configs[name], stage),
            () if fits else changes_for(planner, name, configs[name]),
            seconds_of(stage, card, speed),
        )
    return Plan(recipe.name, card.name, card.memory, speed, told, tuple(stages.values()), verdicts)


def refusal(made: Plan) -> str:
    """What does not fit, in one line."""
    over = [
        f"{stage.name} needs {stage.peak.total / 1e9:.1f} GB"
        for stage in made.stages
        if not made.verdicts[stage.name].fits
    ]
    return f"{made.recipe} does not fit {made.card} ({made.memory / 1e9:.1f} GB): {'; '.join(over)}"
