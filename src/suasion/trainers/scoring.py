"""From a reward's raw numbers to the scores the policy is trained on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from suasion.config.schema import ScoreConfig
from suasion.functional.rewards import (
    RunningMoments,
    clip_scores,
    replace_without_eos,
    scale_scores,
    subtract_without_eos,
)


class ScoreShaper:
    """No-EOS rule, baseline, running scale, clip, in this order. Its state is the running moments.

    Args:
        config: Which of them, and their numbers.
    """

    def __init__(self, config: ScoreConfig) -> None:
        self._config = config
        self.moments = RunningMoments()

    def __call__(self, raw: Tensor, finished: Tensor) -> Tensor:
        """Shape one iteration's scores.

        Args:
            raw: What the reward returned, [B].
            finished: Whether each response ended by itself, bool, [B].
        """
        c = self._config
        scores = raw
        if c.no_eos == "replace":
            scores = replace_without_eos(scores, finished, value=c.no_eos_value)
        elif c.no_eos == "subtract":
            scores = subtract_without_eos(scores, finished, penalty=abs(c.no_eos_value))
        scores = scores - c.baseline
        if c.scale:
            self.moments = self.moments.update(scores)
            scores = scale_scores(scores, std=self.moments.std)
        return scores if c.clip is None else clip_scores(scores, c.clip)

    def state(self) -> dict[str, Any]:
        """Plain values to resume from."""
        return asdict(self.moments)

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was."""
        self.moments = RunningMoments(**state)
