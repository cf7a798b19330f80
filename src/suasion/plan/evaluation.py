"""The evaluation: models that answer, look and judge, and none that learns."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from transformers import PretrainedConfig

from suasion.config.schema import EvaluateConfig
from suasion.core.records import token_batch
from suasion.evaluate.answering import BATCH
from suasion.models.likelihood import perplexity
from suasion.models.load import context_of
from suasion.models.roles import Policy
from suasion.plan.cards import Card
from suasion.plan.records import StagePlan, Work
from suasion.plan.rehearse import Rehearsal, Workshop
from suasion.plan.scoring import SCORED_TOKENS, answer_phases, folded, judge_of
from suasion.plan.training import PERPLEXITY_TOKENS

JUDGES = ("reward", "gold")


class Evaluation:
    """Perplexity, the reward model's card, and two models side by side.

    Args:
        shop: Makes the models.
        config: Of the stage.
        models: Architectures by role: before, after, start, perplexity_of, reward, gold.
        card: Where it would run.
    """

    name = "evaluate"

    def __init__(
        self,
        shop: Workshop,
        config: EvaluateConfig,
        models: dict[str, PretrainedConfig | None],
        card: Card,
    ) -> None:
        there = {name: model for name, model in models.items() if model is not None}
        compared = config.before and config.after
        first = next(iter(there.values()))
        self.stage = Rehearsal(shop.world, first.vocab_size, card.process)
        self.policies: dict[str, Policy] = {}
        self.judges = {}
        self.context = context_of(first)
        self.temperature = config.response.temperature
        for name, model in there.items():
            scores = name in JUDGES
            if not (scores or compared or name in ("start", "perplexity_of")):
                continue
            made = shop.model(f"evaluated {name}", model, scores=scores)
            self.stage.add(name, made)
            if scores:
                self.judges[name] = judge_of(self.stage, made)
            else:
                with self.stage.trying(made):
                    self.policies[name] = Policy(made, 1.0)

    def run(self, config: EvaluateConfig) -> StagePlan:
        """Go through the stage once."""
        length = self.context
        rows = min(max(1, PERPLEXITY_TOKENS // length), config.evaluation_rows)
        for name in ("start", "perplexity_of"):
            if name in self.policies:
                count, each = folded(self.policies[name], rows, length)
                texts = [[0] * each] * count
                look = partial(
                    perplexity, self.policies[name], texts, pad_id=0, batch_tokens=count * each
                )
                self.stage.phase(f"perplexity of {name}", look, [name])
        judges = tuple(self.judges)
        for name, judge in self.judges.items():
            score = partial(judge.score, max(1, SCORED_TOKENS // length), 1, length - 1)
            self.stage.phase(f"scores of {name}", score, judges)
        if "after" in self.policies and "before" in self.policies:
            self._compare(config, ("before", "after", *judges))
        roles = self.stage.roles
        tokens = config.prompts * self.context
        answering = [role for role in roles if role.name in ("before", "after")]
        operations = sum(2.0 * 2.0 * role.parameters * tokens for role in answering)
        streamed = float(sum(sum(r.weights.values()) for r in answering))
        streamed *= config.response.max_tokens * -(-config.prompts // BATCH)
        work = Work(operations, tokens, 1, streamed)
        said = (f"evaluate: prompts and texts up to the context of {self.context} tokens",)
        return StagePlan("evaluate", roles, self.stage.taken(), work, said)

    def _compare(self, config: EvaluateConfig, held: tuple[str, ...]) -> None:
        longest = config.response.max_tokens
        prompt = max(1, self.context - longest)
        count = min(config.prompts, BATCH)
        after, before = self.policies["after"], self.policies["before"]
        answer_phases(
            self.stage, after, count, prompt, config.response, autocast=nullcontext, roles=held
        )
        rows = min(count, max(1, SCORED_TOKENS // self.context))
        rows, p, r = folded(before, rows, prompt, longest)
        batch = token_batch([[0] * p] * rows, [[0] * r] * rows, 0)

        def divergence() -> None:
            before.logprobs(batch)

        self.stage.phase("divergence", divergence, held)
