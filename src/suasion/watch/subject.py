"""What the checks look at: the built parts of a policy stage, and one fresh rollout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from suasion.config.schema import PpoConfig
from suasion.core.files import read_json
from suasion.core.records import Rollout, TokenBatch, token_batch
from suasion.core.seeding import generator
from suasion.models.load import SIDECAR
from suasion.rollout.sampler import Sampling
from suasion.trainers.ppo import PpoParts, roll_out

PROMPTS = 8
"""Prompts the checks answer."""
TOKENS = 96
"""Longest response they sample; what a run allows beyond that is extrapolated."""

NUDGE = 0.02
"""Spread of what stands in for weights that start at zero."""


@dataclass(frozen=True)
class Gap:
    """How far two computations of the same numbers are apart."""

    largest: float
    """Largest absolute difference."""
    rms: float
    """Root of the mean square difference."""

    @classmethod
    def between(cls, one: Tensor, other: Tensor) -> Gap:
        """Of two tensors of one shape; infinite where either is not a number."""
        off = (one.double() - other.double().to(one.device)).abs().nan_to_num(nan=math.inf)
        return cls(float(off.max()), float(off.square().mean().sqrt()))

    def within(self, tolerance: Gap) -> bool:
        """Whether neither figure is above the tolerance's."""
        return self.largest <= tolerance.largest and self.rms <= tolerance.rms


EXACT = Gap(1e-3, 2e-4)
"""Tolerance of float32 arithmetic, and of what runs the same kernels on the same numbers."""
TOLERANCE = {
    torch.float32: EXACT,
    torch.bfloat16: Gap(1.0, 0.1),
}
"""Differences of log-probabilities that arithmetic alone may make, nats: three times or more what
random models show that are as sure of their tokens as trained ones (docs/checks.md). In reduced
precision the mean square decides, since the largest of many rounding errors grows with their
number."""


@dataclass(frozen=True)
class Subject:
    """Built objects, and what they just did."""

    parts: PpoParts
    """Policy, reference, critic, trainer, reward and codec, as the stage will use them."""
    rollout: Rollout
    """Fresh responses of the policy to `queries`."""
    queries: list[str]
    """The prompts of the rollout."""
    sampling: Sampling
    """How the run draws tokens."""
    max_tokens: int
    """Longest response of the run, which may be more than the rollout's."""
    must_end: bool
    """Whether a response that does not end by itself is scored otherwise."""
    template: str
    """The stage's own."""
    templates: Mapping[str, str | None]
    """Template of each stage and model folder, by what it is called; None where none is stored."""
    reward_source: str
    """How the recipe names the reward."""
    seed: int
    """Root of the checks' random numbers."""
    starts_held: bool = True
    """Whether the policy starts at the reference: not where that is another model, or rounded."""
    isolated: bool = False
    """Whether packed documents are claimed not to see each other."""

    @property
    def batch(self) -> TokenBatch:
        """The rollout's sequences, padded on the right, where the policy is."""
        r = self.rollout
        return token_batch(r.queries, r.responses, self.parts.codec.pad_id).to(
            self.parts.policy.device
        )

    @property
    def texts(self) -> list[str]:
        """The rollout's responses as people read them."""
        return [self.parts.codec.text_of(ids) for ids in self.rollout.responses]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What learns."""
        return {"policy": self.parts.policy.model, "critic": self.parts.critic.module}

    @contextmanager
    def nudged(self) -> Iterator[None]:
        """Give weights that learn and are all zero small random ones while the block runs.

        Adapters and value heads start at zero, which hides the dropout in front of an adapter and
        what padding does to a value; and what lies before them has no gradient, rightly so.
        """
        draw = generator(self.seed, "checks", "nudge")
        groups = self.parts.trainer.optimizer.param_groups
        zero = [each for group in groups for each in group["params"] if not each.detach().any()]
        try:
            for each in zero:
                each.data.copy_(torch.randn(each.shape, generator=draw) * NUDGE)
            yield
        finally:
            for each in zero:
                each.data.zero_()

    @property
    def vocabulary(self) -> int:
        """Tokens the policy can give a probability to."""
        return len(self._head)

    @property
    def _head(self) -> Tensor:
        """Weights of the output head, [V, D]."""
        return self.parts.policy.model.get_output_embeddings().weight

    def tolerance(self) -> Gap:
        """What this run's arithmetic may do by itself, when batches or kernels differ."""
        one = torch.ones(1, 1, device=self.parts.policy.device)
        with self.parts.trainer.autocast():
            under_autocast = (one @ one).dtype
        kinds = {under_autocast, self._head.dtype}
        return max((TOLERANCE.get(kind, EXACT) for kind in kinds), key=lambda gap: gap.largest)

    def logprobs(self, batch: TokenBatch) -> Tensor:
        """The policy's log-probabilities of the batch's response tokens, [N], as in training."""
        with torch.no_grad(), self.parts.trainer.autocast():
            return self.parts.policy.logprobs(batch)[0].float()

    def values(self, batch: TokenBatch) -> Tensor:
        """The critic's values before these tokens, [N]."""
        with torch.no_grad(), self.parts.trainer.autocast():
            hidden = self.parts.policy.logprobs(batch)[2]
            return self.parts.critic.values(batch, hidden).float()


def subject_of(
    parts: PpoParts,
    config: PpoConfig,
    *,
    seed: int,
    templates: Mapping[str, str | None] | None = None,
    prompts: int = PROMPTS,
) -> Subject:
    """Let the policy answer a few prompts, by the run's own rollout.

    Args:
        parts: What the stage was built from.
        config: The stage's numbers.
        seed: Root seed.
        templates: Templates of other stages, beside those of this one and its model folders.
        prompts: How many prompts.
    """
    queries = parts.queries[:prompts]
    short = replace(config.response, max_tokens=min(config.response.max_tokens, TOKENS))
    known = {"ppo": config.template, "policy model": stored_template(str(config.model))}
    if Path(str(config.reward)).is_dir():
        known["reward model"] = stored_template(str(config.reward))
    rollout = roll_out(parts, short, queries, seed, ("checks", 0))
    return Subject(
        parts,
        rollout,
        queries,
        Sampling.of(config.response),
        config.response.max_tokens,
        config.score.no_eos != "keep",
        config.template,
        {**(templates or {}), **known},
        str(config.reward),
        seed,
        config.reference.kind != "model" and config.reference.base == "fp32",
    )


def stored_template(source: str) -> str | None:
    """The template a model folder was trained with; None where it does not say."""
    path = Path(source) / SIDECAR
    return read_json(path).get("template") if path.is_file() else None
