"""Stages on the transformers Trainer: pretraining, supervised fine-tuning, the reward model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PretrainedConfig

from suasion.config.schema import PretrainConfig, RewardConfig, SftConfig, TrainingConfig
from suasion.core.records import token_batch
from suasion.models.likelihood import perplexity
from suasion.models.load import context_of
from suasion.models.roles import Policy
from suasion.plan.cards import Card
from suasion.plan.records import RolePlan, StagePlan, Work
from suasion.plan.rehearse import Rehearsal, Workshop, merge_parts, trainer_optimizer
from suasion.plan.scoring import SCORED_TOKENS, folded, judge_of
from suasion.trainers.packed import Blocks, causal_lm_loss
from suasion.trainers.reward import preference_loss, scoring_states

PERPLEXITY_TOKENS = 16384
"""Tokens of one forward pass of `suasion.models.likelihood.perplexity`."""
MODEL = "policy"


class Supervised:
    """Pretraining and supervised fine-tuning: blocks of text.

    Args:
        shop: Makes the models.
        name: "pretrain" or "sft".
        config: Of the stage; sizes may change from run to run, the rest may not.
        model: Configuration of the model.
        card: Where it would run.
    """

    def __init__(
        self,
        shop: Workshop,
        name: str,
        config: PretrainConfig | SftConfig,
        model: PretrainedConfig,
        card: Card,
    ) -> None:
        self.name = name
        self.card = card
        self.vocabulary = model.vocab_size
        lora = config.lora if isinstance(config, SftConfig) else None
        self.model = shop.model(
            MODEL,
            model,
            held=lora.base if lora else "fp32",
            rest=card.rest_dtype(config.precision),
            lora=lora,
        )
        self.context = context_of(model)
        self.stage = Rehearsal(shop.world, model.vocab_size, card.process)
        self.stage.add(MODEL, self.model)
        with self.stage.trying(self.model):
            self.policy = Policy(self.model, 1.0)
        learns = [p for p in self.model.parameters() if p.requires_grad]
        self.stage.train(trainer_optimizer, {MODEL: (learns, config.learning_rate)})
        self.merged = lora if lora is not None and lora.r > 0 and lora.merge else None

    def run(self, config: PretrainConfig | SftConfig) -> StagePlan:
        """Go through the stage once, with the sizes of `config`."""
        rows = max(1, PERPLEXITY_TOKENS // config.block)
        if isinstance(config, SftConfig):
            rows = min(rows, config.evaluation_rows)
        rows, length = folded(self.policy, rows, max(2, config.block))
        texts = [[0] * length] * rows
        self.model.train()
        self.stage.phase("update", partial(self._update, config))
        self.stage.forget_gradients()
        self.stage.phase(
            "perplexity",
            lambda: perplexity(self.policy, texts, pad_id=0, batch_tokens=rows * length),
        )
        if self.merged:
            merge_parts(self.stage, self.model, self.merged, on_host=self.card.gpu)
        tokens = config.batch_size * config.accumulate * config.block
        work = Work(training_operations(self.stage.roles, tokens), tokens, config.max_steps)
        return StagePlan(self.name, self.stage.roles, self.stage.taken(), work)

    def _update(self, config: PretrainConfig | SftConfig) -> None:
        count, length = folded(self.policy, config.batch_size, config.block)
        rows = [torch.zeros(length, dtype=torch.long)] * count
        for _ in range(min(config.accumulate, 2)):
            with self.card.autocast(config.precision):
                loss = causal_lm_loss(self.policy, Blocks.collate(rows))
            loss.backward()
        trainer_step(self.stage, self.model, config)


class Pairs:
    """The reward model: two answers to one question.

    Args:
        shop: Makes the models.
        config: Of the stage; sizes may change from run to run, the rest may not.
        model: Configuration of the model it starts from.
        card: Where it would run.
    """

    name = "reward"

    def __init__(
        self, shop: Workshop, config: RewardConfig, model: PretrainedConfig, card: Card
    ) -> None:
        self.card = card
        self.model = shop.model(
            "reward",
            model,
            scores=True,
            own_dropout=False,
            held=config.lora.base,
            rest=card.rest_dtype(config.precision),
            lora=config.lora,
        )
        self.context = context_of(model)
        self.stage = Rehearsal(shop.world, model.vocab_size, card.process)
        self.stage.add("reward", self.model)
        with self.stage.trying(self.model):
            self.states = scoring_states(self.model)
        learns = [p for p in self.model.parameters() if p.requires_grad]
        self.stage.train(trainer_optimizer, {"reward": (learns, config.learning_rate)})
        self.merges = config.lora.r > 0 and config.lora.merge
        # The trained model is saved, let go, and loaded again, merged and in fp32, to be judged.
        judge = shop.model("judge", model, scores=True)
        self.card_stage = Rehearsal(shop.world, model.vocab_size, card.process)
        self.card_stage.add("reward", judge)
        self.judge = judge_of(self.card_stage, judge)

    def run(self, config: RewardConfig) -> StagePlan:
        """Go through the stage once, with the sizes of `config`."""
        length = min(config.max_length or self.context, self.context)
        self.model.train()
        self.stage.phase("update", partial(self._update, config, length))
        self.stage.forget_gradients()
        rows = max(1, min(SCORED_TOKENS // length, 2 * config.evaluation_pairs))
        self.card_stage.phase("scoring", partial(self.judge.score, rows, 1, length - 1))
        if self.merges:
            merge_parts(self.stage, self.model, config.lora, on_host=self.card.gpu)
        tokens = 2 * config.batch_size * config.accumulate * length
        work = Work(training_operations(self.stage.roles, tokens), tokens, config.max_steps)
        said = () if config.max_length else (f"reward: texts of up to {length} tokens",)
        phases = (*self.stage.taken(), *self.card_stage.taken())
        return StagePlan(self.name, self.stage.roles, phases, work, said)

    def _update(self, config: RewardConfig, length: int) -> None:
        # One text is shorter than the others, so that there is padding to mask.
        count, each = folded(self.states, 2 * config.batch_size, length)
        count += count % 2
        lengths = [each - 1] * (count - 1) + [max(1, each - 2)]
        batch = token_batch([[0]] * len(lengths), [[0] * n for n in lengths], 0)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask}
        for _ in range(min(config.accumulate, 2)):
            with self.card.autocast(config.precision):
                loss = preference_loss(self.states, config.center, inputs)
            loss.backward()
        trainer_step(self.stage, self.model, config)


def trainer_step(stage: Rehearsal, model: Any, config: TrainingConfig) -> None:
    """Clip and step as the Trainer does."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    stage.optimizer.step()


def training_operations(roles: Sequence[RolePlan], tokens: int) -> float:
    """Operations of forward and backward passes over `tokens`.

    Two per weight and token forward, two for the gradient of the activations, two for that of the
    weights where they train (arXiv 2001.08361, section 2.1); attention over long contexts, which is
    not in that count, is left out.
    """
    return sum(tokens * (4.0 * role.parameters + 2.0 * role.trainable) for role in roles)
