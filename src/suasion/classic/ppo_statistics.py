"""What `step` returns, under the published names and with their published meanings.

Names, and which of them are arrays: huggingface/trl@v0.11.4 trl/trainer/ppo_trainer.py,
`record_step_stats` and `loss`. Where our own statistics mean the same they are taken over; what
differs there (unbiased variances, `var_explained` from the uncentred error) is computed here.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from suasion.classic.tools import as_numpy
from suasion.functional.losses import importance_ratio
from suasion.functional.masking import masked_mean, masked_sum, masked_var
from suasion.rollout.experience import Experience
from suasion.trainers.ppo_stats import experience_statistics


class MiniBatches:
    """Gathers what the update does, mini-batch by mini-batch; an `Observer` of the trainer."""

    def __init__(self) -> None:
        self._advantages: list[Tensor] = []
        self._ratios: list[Tensor] = []
        self._variances: dict[str, list[float]] = {"ppo/returns/var": [], "ppo/val/var": []}

    def __call__(self, tokens: dict[str, Tensor]) -> None:
        """Take in one mini-batch; all values [N]."""
        self._advantages.append(tokens["advantages"])
        self._ratios.append(importance_ratio(tokens["new"], tokens["old"]))
        self._variances["ppo/returns/var"].append(spread(tokens["returns"]) ** 2)
        self._variances["ppo/val/var"].append(spread(tokens["old_values"]) ** 2)

    def statistics(self, error: float) -> dict[str, Any]:
        """Arrays over all mini-batches, mean variances, and the explained variance.

        Args:
            error: Mean squared error of the values.
        """
        found: dict[str, Any] = {
            name: sum(values) / len(values) for name, values in self._variances.items()
        }
        variance = found["ppo/returns/var"]
        found["ppo/val/var_explained"] = 1 - error / variance if variance else math.nan
        found["ppo/policy/advantages"] = as_numpy(torch.cat(self._advantages))
        found["ppo/policy/ratio"] = as_numpy(torch.cat(self._ratios))
        return found


def step_statistics(
    experience: Experience, raw: Tensor, penalties: Tensor, finished: list[bool]
) -> dict[str, Any]:
    """Statistics of one batch before its update.

    Args:
        experience: The batch.
        raw: Scores as given, [B].
        penalties: KL penalty per token as configured, nats, [B, R].
        finished: Whether each response ends with an EOS token.
    """
    e = experience
    mask = e.mask.cpu()
    kl = masked_sum(penalties.cpu(), mask, dim=1)
    queries = torch.tensor([float(len(query)) for query in e.queries])
    responses = torch.tensor([float(len(response)) for response in e.responses])
    return {
        **experience_statistics(e, raw, finished),
        "objective/kl": float(kl.mean()),
        "objective/kl_dist": as_numpy(kl),
        "objective/logprobs": as_numpy(e.logprobs),
        "objective/ref_logprobs": as_numpy(e.ref_logprobs),
        "ppo/mean_non_score_reward": float(masked_mean(-e.kl_coef * penalties.cpu(), mask)),
        "ppo/std_scores": spread(e.scores),
        "env/reward_std": spread(raw),
        "tokens/queries_len_std": spread(queries),
        "tokens/queries_dist": as_numpy(queries),
        "tokens/responses_len_std": spread(responses),
        "tokens/responses_dist": as_numpy(responses),
    }


def spread(values: Tensor) -> float:
    """Unbiased standard deviation; 0 for a single value."""
    if values.numel() < 2:
        return 0.0
    everything = torch.ones_like(values, dtype=torch.bool)
    return math.sqrt(masked_var(values.double(), everything, ddof=1))


class Clock:
    """Seconds between named moments."""

    def __init__(self) -> None:
        self._begun = self._last = time.perf_counter()
        self._spans: dict[str, float] = {}

    def note(self, name: str) -> None:
        """Whatever happened since the last note was `name`."""
        now = time.perf_counter()
        self._spans[f"time/ppo/{name}"] = now - self._last
        self._last = now

    def spans(self) -> dict[str, float]:
        """All spans, and the time since the beginning."""
        return {**self._spans, "time/ppo/total": time.perf_counter() - self._begun}
