"""From a reward's raw numbers to the scores the policy is trained on."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from suasion.config.schema import ScoreConfig
from suasion.functional.rewards import (
    RunningMoments,
    clip_scores,
    overlong_penalty,
    replace_without_eos,
    scale_scores,
    subtract_without_eos,
)


class ScoreShaper:
    """No-EOS rule, penalty of length, baseline, running scale, clip, in this order.

    Its state is the running moments.

    Args:
        config: Which of them, and their numbers.
        max_tokens: Length at which the whole penalty of length is due.
    """

    def __init__(self, config: ScoreConfig, max_tokens: int) -> None:
        self._config = config
        self._max_tokens = max_tokens
        self.moments = RunningMoments()

    def __call__(self, raw: Tensor, finished: Tensor, lengths: Tensor) -> Tensor:
        """Shape one iteration's scores.

        Args:
            raw: What the reward returned, [B].
            finished: Whether each response ended by itself, bool, [B].
            lengths: Tokens of each response, [B].
        """
        c = self._config
        scores = raw
        if c.no_eos == "replace":
            scores = replace_without_eos(scores, finished, value=c.no_eos_value)
        elif c.no_eos == "subtract":
            scores = subtract_without_eos(scores, finished, penalty=abs(c.no_eos_value))
        if c.overlong is not None:
            scores = scores + overlong_penalty(
                lengths,
                max_length=self._max_tokens,
                buffer=c.overlong,
                factor=c.overlong_penalty,
            )
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
