"""A recipe file and its overrides become one resolved `Recipe`: every input of a stage is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from suasion.config.load import merged, parse_overrides, read_yaml, validate
from suasion.config.schema import Recipe
from suasion.core.errors import ConfigError

STAGES = ("prepare", "pretrain", "sft", "reward", "ppo", "merge", "evaluate", "report")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay the overrides on top, validate, and resolve what stages hand on.

    Raises:
        ConfigError: every mistake in the file and the overrides, or a stage without its input.
    """
    values = merged(read_yaml(path), parse_overrides(overrides))
    return resolve(with_template(validate(Recipe, values, str(path))))


def with_template(recipe: Recipe) -> Recipe:
    """Give the recipe's template, where it has one, to every stage."""
    if recipe.template is None:
        return recipe
    stages = {
        name: replace(stage, template=recipe.template)
        for name in STAGES
        if (stage := getattr(recipe, name)) is not None and hasattr(stage, "template")
    }
    return replace(recipe, **stages)


def resolve(recipe: Recipe) -> Recipe:
    """Fill the inputs a stage did not name with what the stages before it leave.

    Raises:
        ConfigError: lists every stage whose input is neither named nor made before it.
    """
    out = Path(recipe.out)
    data = str(out / "prepare") if recipe.prepare else None
    model: str | None = None
    reward: str | None = None
    changes: dict[str, object] = {}
    missing: list[str] = []

    def need(key: str, *candidates: str | None) -> str | None:
        found = next((candidate for candidate in candidates if candidate), None)
        if found is None:
            missing.append(key)
        return found

    started = None
    if recipe.pretrain:
        text = need("pretrain.text", recipe.pretrain.text, data)
        changes["pretrain"] = replace(recipe.pretrain, text=text)
        started = recipe.pretrain.model or str(out / "pretrain" / "start")
        model = str(out / "pretrain" / "model")
    if recipe.sft:
        source = need("sft.model", recipe.sft.model, model)
        changes["sft"] = replace(
            recipe.sft, model=source, data=need("sft.data", recipe.sft.data, data)
        )
        started = started or source
        model = str(out / "sft" / "model")
    supervised = model
    if recipe.reward:
        changes["reward"] = replace(
            recipe.reward,
            model=need("reward.model", recipe.reward.model, model),
            data=need("reward.data", recipe.reward.data, data),
        )
        shares = recipe.ppo is not None and recipe.ppo.shared_base
        reward = str(out / "reward" / ("adapter" if shares else "model"))
    if recipe.ppo:
        supervised = need("ppo.model", recipe.ppo.model, model)
        reward = need("ppo.reward", recipe.ppo.reward, reward)
        changes["ppo"] = replace(
            recipe.ppo,
            model=supervised,
            reward=reward,
            data=need("ppo.data", recipe.ppo.data, data),
        )
        model = str(out / "ppo" / "model")
    if recipe.merge:
        changes["merge"] = replace(
            recipe.merge,
            model=need("merge.model", recipe.merge.model, model),
            data=need("merge.data", recipe.merge.data, data),
        )
        model = str(out / "merge" / "model")
    if recipe.evaluate:
        e = recipe.evaluate
        changes["evaluate"] = replace(
            e,
            before=need("evaluate.before", e.before, supervised),
            after=e.after or (model if recipe.ppo else None),
            start=e.start or started,
            perplexity_of=e.perplexity_of or supervised,
            reward=e.reward or reward,
            data=need("evaluate.data", e.data, data, recipe.ppo.data if recipe.ppo else None),
        )
    if missing:
        raise ConfigError(
            f"{recipe.name}: nothing gives {', '.join(missing)}",
            "name it in the recipe (or as an option), or add the stage that makes it",
        )
    return replace(recipe, **changes)  # type: ignore[arg-type]
