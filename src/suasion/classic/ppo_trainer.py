"""`generate`, `step`, `log_stats`: the published loop in three calls, on the core's own machinery.

Nothing is computed here a second time: log-probabilities come from `models.roles`, rewards and
advantages from `rollout.experience`, optimizer steps from `trainers.policy`. What differs from the
old library, and why, is listed in docs/classic.md.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from suasion.classic.errors import ArgumentError
from suasion.classic.generation import generate_responses, generation_options
from suasion.classic.ppo_batch import StepBatch, checked_batch
from suasion.classic.ppo_config import PPOConfig
from suasion.classic.ppo_roles import (
    HeadCritic,
    ReferenceRole,
    chosen_reference,
    full_penalty,
    scored_rollout,
)
from suasion.classic.ppo_setup import (
    NoSchedule,
    adam,
    batches_of,
    check_optimizer,
    check_parts,
    controller_of,
)
from suasion.classic.ppo_statistics import Clock, MiniBatches, step_statistics
from suasion.classic.ranks import average_over_ranks, same_on_every_rank, seed_this_rank
from suasion.classic.tools import set_seed
from suasion.classic.tracking import Tracking, make_accelerator
from suasion.classic.value_head import AutoModelForCausalLMWithValueHead
from suasion.core.errors import TrainingError
from suasion.core.seeding import generator
from suasion.functional import kl as kl_estimators
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.functional.masking import whiten
from suasion.functional.rewards import RunningMoments, clip_scores, scale_scores
from suasion.models.load import switch_off_dropout
from suasion.models.roles import Policy
from suasion.rollout.experience import Experience, build_experience
from suasion.trainers.policy import PolicyTrainer, UpdateSettings

_PENALTIES = {
    "kl": kl_estimators.k1,
    "abs": kl_estimators.absolute_difference,
    "mse": kl_estimators.k2,
}
_NEGATIVE_KL = -1.0
"""Below this mean KL the responses were not sampled from the policy as it is scored."""


class PPOTrainer:
    """Proximal policy optimisation of a model with a value head.

    Args:
        config: The settings.
        model: What learns. Its dropout is switched off.
        ref_model: What it is held to; None: the base with adapters off where `model` has adapters,
            else a frozen copy.
        tokenizer: The model's.
        dataset: Queries; gives `dataloader`.
        optimizer: Over the parameters of `model`; None: Adam at the configured learning rate.
        data_collator: For `dataloader`.
        num_shared_layers: Layers the reference shares with the model, see
            `create_reference_model`.
        lr_scheduler: Stepped once per `step`.

    Raises:
        ArgumentError: an argument has the wrong type or does not fit the others.
    """

    # The published constructor builds what it needs, unlike our own classes.
    def __init__(
        self,
        config: PPOConfig | None = None,
        model: AutoModelForCausalLMWithValueHead | None = None,
        ref_model: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Dataset[Any] | datasets.Dataset | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        config, model, tokenizer = check_parts(config, model, tokenizer, lr_scheduler)
        set_seed(config.seed)
        self.config = config
        self.tokenizer = tokenizer
        self.accelerator: Accelerator = make_accelerator(config)
        self.current_device = self.accelerator.device
        self.is_peft_model = model.is_peft_model
        if not getattr(model.pretrained_model, "hf_device_map", None):
            model.to(self.current_device)
        switch_off_dropout(model)
        same_on_every_rank(self.accelerator, model)
        self.model = model
        self._policy = Policy(model.pretrained_model, temperature=1.0)
        self._reference: ReferenceRole
        self._reference, self.ref_model = chosen_reference(
            self._policy, model, ref_model, num_shared_layers, self.current_device
        )
        self.optimizer = optimizer if optimizer is not None else adam(model, config)
        check_optimizer(self.optimizer, model)
        self.lr_scheduler = lr_scheduler
        self.data_collator = data_collator
        self.dataset = dataset
        self.dataloader = self.prepare_dataloader(dataset, data_collator) if dataset else None
        self.kl_ctl = controller_of(config)
        self.current_step = 0
        self.highest_reward = float("-inf")
        self._moments = RunningMoments()
        self._updater = self._make_updater()
        self._tracking = Tracking(self.accelerator, config)
        config.world_size = self.accelerator.num_processes
        seed_this_rank(self.accelerator, config.seed)

    @property
    def pad_id(self) -> int:
        """Fills batches; may be the EOS token, no length is read from it."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def prepare_dataloader(
        self,
        dataset: Dataset[Any] | datasets.Dataset,
        data_collator: Callable[[list[Any]], Any] | None = None,
    ) -> DataLoader[Any]:
        """Shuffled batches of `batch_size` rows; the last, incomplete one is left out.

        Raises:
            ArgumentError: there are fewer rows than one batch.
        """
        known = {*inspect.signature(self.model.forward).parameters, "query", "response", "label"}
        loader = batches_of(dataset, data_collator, self.config, known)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def generate(
        self,
        query_tensor: Tensor | list[Tensor],
        length_sampler: Callable[[], int] | None = None,
        batch_size: int = 4,
        return_prompt: bool = True,  # noqa: FBT001, FBT002 (the published signature)
        generate_ref_response: bool = False,  # noqa: FBT001, FBT002 (the same)
        **generation_kwargs: Any,
    ) -> Any:
        """Generate a response for one query or for a list of them.

        Args:
            query_tensor: Token ids, 1-D, or a list of such.
            length_sampler: Draws `max_new_tokens`, once per batch.
            batch_size: Queries at a time, of a list.
            return_prompt: Put the query in front of its response.
            generate_ref_response: Also answer with the reference.
            generation_kwargs: For transformers' `generate`.

        Returns:
            For a list, a list of 1-D tensors without padding; for one query, a tensor [1, T]. With
            `generate_ref_response`, a pair of these.

        Raises:
            ArgumentError: a query is not one 1-D tensor.
        """
        single = isinstance(query_tensor, Tensor)
        queries = [query_tensor] if isinstance(query_tensor, Tensor) else list(query_tensor)
        for row, query in enumerate(queries):
            if not isinstance(query, Tensor) or query.ndim != 1 or not len(query):
                shape = tuple(query.shape) if isinstance(query, Tensor) else type(query).__name__
                raise ArgumentError(
                    f"query {row} is {shape}, it must be a tensor with one axis and a token",
                    "give a 1-D tensor of token ids, or a list of them",
                )
        stops = self._stop_ids(generation_kwargs)
        answer = partial(
            generate_responses,
            queries=queries,
            stop_ids=stops,
            pad_id=self.pad_id,
            batch_size=batch_size,
            return_prompt=return_prompt,
            length_sampler=length_sampler,
            options=generation_options(generation_kwargs, stops, self.pad_id),
        )
        found = answer(self._policy.model)
        if not generate_ref_response:
            return found[0][None] if single else found
        with self._reference.active():
            other = answer(self._reference.policy.model)
        return (found[0][None], other[0][None]) if single else (found, other)

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Optimise on one batch.

        Args:
            queries: 1-D token tensors, without padding.
            responses: 1-D token tensors, without the query and without padding.
            scores: One number each.
            response_masks: 1 at response tokens that count, as long as the responses.

        Returns:
            Statistics by their published names: floats, and arrays for distributions.

        Raises:
            ArgumentError: an argument has the wrong type, length or shape.
            RewardError: a score is not finite.
            TrainingError: the loss is not finite.
        """
        config = self.config
        batch = checked_batch(queries, responses, scores, response_masks, config.batch_size)
        clock = Clock()
        # No forward pass then holds more than mini_batch_size of the longest sequences.
        budget = max(batch.lengths) * config.mini_batch_size
        self._updater.settings = replace(self._updater.settings, micro_batch_tokens=budget)
        with self._updater.autocast():
            experience, penalties, finished = self._experience(batch, clock)
        rate = float(self.optimizer.param_groups[0]["lr"])
        seen = MiniBatches()
        update = self._updater.optimise(
            experience, generator(config.seed, "mini-batches", self.current_step), observe=seen
        )
        clock.note("optimize_step")
        stats = step_statistics(experience, batch.scores, penalties, finished) | update
        stats |= seen.statistics(update["ppo/val/error"])
        stats = average_over_ranks(self.accelerator, stats)
        stats["ppo/learning_rate"] = rate
        self._refuse_broken(stats)
        clock.note("calc_stats")
        self.kl_ctl.update(
            stats["objective/kl"], config.batch_size * self.accelerator.num_processes
        )
        self.current_step += 1
        self._push_if_best(stats["ppo/mean_scores"])
        if config.optimize_device_cache and self.current_device.type == "cuda":
            torch.cuda.empty_cache()
        return stats | clock.spans()

    def log_stats(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Hand a step's statistics, its rewards and (to wandb) its texts to the trackers.

        Args:
            stats: What `step` returned.
            batch: Columns of the batch.
            rewards: The scores given to `step`.
            columns_to_log: Columns of the table of texts.

        Raises:
            ArgumentError: a column to log is not in the batch.
        """
        self._tracking.log(stats, batch, rewards, columns_to_log, self.current_step)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write policy, value head and tokenizer."""
        if self.accelerator.is_main_process:
            self.model.save_pretrained(save_directory, **kwargs)
            self.tokenizer.save_pretrained(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Upload policy, value head and tokenizer."""
        if self.accelerator.is_main_process:
            self.model.push_to_hub(repo_id, **kwargs)
            self.tokenizer.push_to_hub(repo_id, **kwargs)

    def _make_updater(self) -> PolicyTrainer:
        c = self.config
        return PolicyTrainer(
            self._policy,
            HeadCritic(self.model.v_head),
            self.optimizer,
            self.lr_scheduler or NoSchedule(),
            partial(clipped_surrogate, clip_low=c.cliprange, clip_high=c.cliprange),
            partial(clipped_value_loss, clip=c.cliprange_value),
            UpdateSettings(
                epochs=c.ppo_epochs,
                mini_batch_size=c.backward_batch_size,
                micro_batch_tokens=1,
                max_grad_norm=float("inf") if c.max_grad_norm is None else c.max_grad_norm,
                value_coef=c.vf_coef,
                clip=c.cliprange,
                value_clip=c.cliprange_value,
                kl_stop=c.target_kl if c.early_stopping else None,
                ratio_limit=c.ratio_threshold,
            ),
            pad_id=self.pad_id,
            autocast=self.accelerator.autocast,
            sum_over_ranks=partial(self.accelerator.reduce, reduction="sum"),
        )

    def _experience(self, batch: StepBatch, clock: Clock) -> tuple[Experience, Tensor, list[bool]]:
        """Score every token of a batch; also the penalties, and which responses ended."""
        c = self.config
        budget = self._updater.settings.micro_batch_tokens
        rollout = scored_rollout(
            batch,
            self._policy,
            self._updater.critic,
            stop_ids=self._stop_ids({}),
            pad_id=self.pad_id,
            batch_tokens=budget,
        )
        penalties: list[Tensor] = []
        penalty: Callable[[Tensor, Tensor], Tensor] = (
            full_penalty(self._policy, self._reference, rollout, self.pad_id, budget)
            if c.kl_penalty == "full"
            else _PENALTIES[c.kl_penalty]
        )

        def watched_penalty(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
            clock.note("forward_pass")
            penalties.append(penalty(logprobs, ref_logprobs))
            return penalties[0]

        def estimate(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            clock.note("compute_rewards")
            enough = int(mask.sum()) > 1  # a single token has no variance
            if c.whiten_rewards and enough:
                rewards = whiten(rewards, mask, ddof=1, shift_mean=False)
            advantages, returns = gae(rewards, values, mask, gamma=c.gamma, lam=c.lam)
            if enough:
                advantages = whiten(advantages, mask, ddof=1)
            return advantages, returns

        experience = build_experience(
            rollout,
            self._shaped(batch.scores),
            policy=self._policy,
            reference=self._reference.scorer,
            critic=self._updater.critic,
            estimate=estimate,
            kl_coef=self.kl_ctl.value,
            whiten_advantages=False,
            pad_id=self.pad_id,
            batch_tokens=budget,
            penalty=watched_penalty,
            counts=batch.counts,
        )
        clock.note("compute_advantages")
        return experience, penalties[0], rollout.finished

    def _shaped(self, scores: Tensor) -> Tensor:
        """Scores scaled and clipped as configured."""
        c = self.config
        if c.use_score_scaling:
            self._moments = self._moments.update(scores)
            mean = self._moments.mean if c.use_score_norm else 0.0
            scores = scale_scores(scores, std=self._moments.std, mean=mean)
        return scores if c.score_clip is None else clip_scores(scores, c.score_clip)

    def _stop_ids(self, kwargs: dict[str, Any]) -> list[int]:
        """Tokens that end a response: as asked, else the model's, else the tokenizer's."""
        settings = getattr(self._policy.model, "generation_config", None)
        for found in (
            kwargs.get("eos_token_id"),
            getattr(settings, "eos_token_id", None),
            self.tokenizer.eos_token_id,
        ):
            if found is not None:
                return [int(token) for token in (found if isinstance(found, list) else [found])]
        return []

    def _refuse_broken(self, stats: dict[str, Any]) -> None:
        loss = stats["ppo/loss/total"]
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingError(
                f"step {self.current_step}: the loss is {loss}",
                "lower the learning rate, or set max_grad_norm or score_clip",
            )
        if stats["objective/kl"] < _NEGATIVE_KL:
            warnings.warn(
                f"objective/kl is {stats['objective/kl']:.2f}: the responses are not samples of "
                "the policy as it is scored; sample with top_k=0, top_p=1.0, no minimum length",
                UserWarning,
                stacklevel=3,
            )

    def _push_if_best(self, score: float) -> None:
        """With `push_to_hub_if_best_kwargs`, upload a model better than all before."""
        kwargs = self.config.push_to_hub_if_best_kwargs
        if not kwargs or self.current_step % self.config.compare_steps:
            return
        if score > self.highest_reward:
            self.highest_reward = score
            self.push_to_hub(**kwargs)
