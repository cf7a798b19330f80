"""From a recipe to its plan: where each model comes from, stage after stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from suasion.config.schema import (
    EvaluateConfig,
    FreshModelConfig,
    LoraConfig,
    PpoConfig,
    PretrainConfig,
    Recipe,
    RewardConfig,
    SftConfig,
)
from suasion.core.errors import ModelError
from suasion.core.files import read_json
from suasion.models.load import context_of, fresh_causal_lm
from suasion.plan.cards import Card
from suasion.plan.evaluation import Evaluation
from suasion.plan.policy import Cast, PolicyStage
from suasion.plan.records import StagePlan
from suasion.plan.rehearse import Workshop
from suasion.plan.training import Pairs, Supervised

PLANNED = ("pretrain", "sft", "reward", "ppo", "evaluate")
"""Stages with models; merging is a phase of the stage that trained the adapter."""

SIZES: dict[str, tuple[str, ...]] = {
    "pretrain": ("batch_size", "accumulate", "block", "max_steps"),
    "sft": ("batch_size", "accumulate", "block", "max_steps", "evaluation_rows"),
    "reward": ("batch_size", "accumulate", "max_length", "max_steps", "evaluation_pairs"),
    "ppo": (
        "batch_size",
        "mini_batch_size",
        "micro_batch_tokens",
        "prompt_tokens",
        "response",
        "steps",
        "epochs",
    ),
    "evaluate": ("prompts", "response", "evaluation_rows", "evaluation_pairs"),
}
"""Options that do not change who is in memory: a stage that was built once is run again."""


@dataclass(frozen=True)
class Origin:
    """What is known of a model before it is made."""

    config: PretrainedConfig
    """Its architecture."""
    lora: LoraConfig | None = None
    """Its adapter, where it is the folder of one."""


class Planner:
    """Plans stages against a card.

    Args:
        card: Where they would run.
        recipe: Whose stages hand models on; None: every model is there already.
    """

    def __init__(self, card: Card, recipe: Recipe | None = None) -> None:
        self.card = card
        self._shop = Workshop()
        self._made = {} if recipe is None else _made_by(recipe)
        self._origins: dict[str, Origin] = {}
        self._stages: dict[tuple[str, str], Any] = {}

    def stage(self, name: str, config: Any) -> StagePlan:
        """Go through one stage.

        Raises:
            ConfigError: two options do not go together.
            ModelError: a model's configuration is not there, or cannot be read.
        """
        fixed = {key: getattr(type(config)(), key) for key in SIZES[name]}
        key = (name, repr(replace(config, **fixed)))
        if key not in self._stages:
            self._stages[key] = self._built(name, config)
        plan: StagePlan = self._stages[key].run(config)
        return plan

    def context_of(self, name: str, config: Any) -> int:
        """Longest sequence of a stage's model, tokens."""
        if isinstance(config, PretrainConfig) and config.model is None:
            return config.fresh.context
        source = config.before or config.after if name == "evaluate" else config.model
        return context_of(self.origin(source).config)

    def _built(self, name: str, config: Any) -> Any:
        if isinstance(config, PretrainConfig):
            model = self.origin(config.model).config if config.model else fresh_config(config.fresh)
            return Supervised(self._shop, name, config, model, self.card)
        if isinstance(config, SftConfig):
            return Supervised(self._shop, name, config, self.origin(config.model).config, self.card)
        if isinstance(config, RewardConfig):
            return Pairs(self._shop, config, self.origin(config.model).config, self.card)
        if isinstance(config, PpoConfig):
            return PolicyStage(self._shop, config, self._cast(config), self.card)
        assert isinstance(config, EvaluateConfig)
        return Evaluation(self._shop, config, self._judged(config), self.card)

    def _cast(self, config: PpoConfig) -> Cast:
        policy, reward = self.origin(config.model), self._reward(config.reward)
        other = config.reference.model
        return Cast(
            policy.config,
            reward.config if reward else None,
            self.origin(other).config if other else None,
            continued=policy.lora is not None and config.lora.r > 0,
            reward_lora=reward.lora if reward else None,
        )

    def _judged(self, config: EvaluateConfig) -> dict[str, PretrainedConfig | None]:
        found: dict[str, PretrainedConfig | None] = {
            name: self.origin(source).config if source else None
            for name, source in (
                ("before", config.before),
                ("after", config.after),
                ("start", config.start),
                ("perplexity_of", config.perplexity_of),
            )
        }
        for name, source in (("reward", config.reward), ("gold", config.gold)):
            judge = self._reward(source)
            found[name] = judge.config if judge else None
        return found

    def _reward(self, source: str | None) -> Origin | None:
        """A reward's model; None where it is a function."""
        if source is None:
            return None
        if source.startswith("pipeline:"):
            return self.origin(source.removeprefix("pipeline:").partition("#")[0])
        if ":" in source and not Path(source).is_dir() and source not in self._made:
            return None
        return self.origin(source)

    def origin(self, source: str | None) -> Origin:
        """The architecture of a model, from its folder or from the stage that will make it.

        Raises:
            ModelError: there is none, and no stage of the recipe makes it.
        """
        name = str(source)
        if name not in self._origins:
            self._origins[name] = self._found(name)
        return self._origins[name]

    def _found(self, source: str) -> Origin:
        folder = Path(source)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            stored = read_json(adapter)
            base = self.origin(str(stored["base_model_name_or_path"])).config
            return Origin(base, LoraConfig(r=int(stored.get("r", 0))))
        if source in self._made and not (folder / "config.json").is_file():
            before = self._made[source]
            if isinstance(before, FreshModelConfig):
                return Origin(fresh_config(before))
            parent, lora = before
            return Origin(self.origin(parent).config, lora)
        return Origin(read_config(source))


def _made_by(recipe: Recipe) -> dict[str, Any]:
    """Folder of each model that the recipe will make -> what it is made of, and its adapter."""
    out = Path(recipe.out)
    made: dict[str, Any] = {}
    if recipe.pretrain:
        start = str(out / "pretrain" / "start")
        made[start] = recipe.pretrain.fresh
        made[str(out / "pretrain" / "model")] = (recipe.pretrain.model or start, None)
    for name in ("sft", "reward", "ppo"):
        config = getattr(recipe, name)
        if config is not None:
            lora = config.lora if config.lora.r else None
            made[str(out / name / "adapter")] = (config.model, lora)
            whole = None if lora is None or lora.merge else lora
            made[str(out / name / "model")] = (config.model, whole)
    if recipe.merge:
        made[str(out / "merge" / "model")] = (recipe.merge.model, None)
    return made


def fresh_config(fresh: FreshModelConfig) -> PretrainedConfig:
    """Architecture of a model that pretraining makes from nothing."""
    from suasion.plan.ledger import without_contents

    tokenizer: Any = _Vocabulary(fresh.vocabulary)
    with without_contents():
        model = fresh_causal_lm(
            family=fresh.family,
            tokenizer=tokenizer,
            context=fresh.context,
            hidden_size=fresh.hidden_size,
            layers=fresh.layers,
            heads=fresh.heads,
            seed=0,
        )
    config: PretrainedConfig = model.config
    return config


class _Vocabulary(SimpleNamespace):
    """A tokenizer of which only the size matters."""

    def __init__(self, size: int) -> None:
        super().__init__(eos_token_id=0, pad_token_id=1)
        self._size = size

    def __len__(self) -> int:
        return self._size


def read_config(source: str) -> PretrainedConfig:
    """The architecture in a model folder, or of a name on the Hub; no weights are read.

    Raises:
        ModelError: there is none.
    """
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"{source} is not a model folder: it has no config.json")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{source}: no such model folder, and no configuration of that name ({reason})",
            "check the path; a recipe is planned from its first model's config.json",
        ) from error
    return config
