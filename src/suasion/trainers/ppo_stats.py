"""What an iteration's experience looked like, under the published names (mission, row C3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from suasion.functional.masking import masked_mean
from suasion.functional.rewards import terminal_rewards
from suasion.rollout.experience import Experience


def experience_statistics(
    experience: Experience, raw: Tensor, finished: Sequence[bool]
) -> dict[str, float]:
    """Statistics of rewards, KL and lengths before the update.

    Names and meanings follow huggingface/trl@v0.11.4, trl/trainer/ppo_trainer.py: `objective/kl` is
    the mean over responses of the summed k1, whatever is penalised, `objective/entropy` the mean of
    the summed negative log-probabilities, `ppo/mean_non_score_reward` the mean penalty of a token.

    Args:
        experience: The iteration.
        raw: What the reward returned, [B].
        finished: Whether each response ended by itself.
    """
    e = experience
    difference = (e.logprobs - e.ref_logprobs) * e.mask
    queries = torch.tensor([len(q) for q in e.queries], dtype=torch.float32)
    responses = torch.tensor([len(r) for r in e.responses], dtype=torch.float32)
    return {
        "env/reward_mean": float(raw.mean()),
        "env/reward_std": float(raw.std(unbiased=False)),
        "objective/kl": float(difference.sum(-1).mean()),
        "objective/kl_coef": e.kl_coef + e.loss_kl_coef,
        "objective/entropy": float(-(e.logprobs * e.mask).sum(-1).mean()),
        "ppo/mean_scores": float(e.scores.mean()),
        "ppo/std_scores": float(e.scores.std(unbiased=False)),
        "ppo/mean_non_score_reward": float(
            masked_mean(e.rewards - terminal_rewards(e.scores, e.mask), e.mask)
        ),
        "tokens/queries_len_mean": float(queries.mean()),
        "tokens/responses_len_mean": float(responses.mean()),
        "tokens/responses_len_std": float(responses.std(unbiased=False)),
        "tokens/unfinished": 1.0 - sum(finished) / len(finished),
    }


NGRAM = 4
"""Words that must come again in the same order to count as repetition."""


def text_statistics(texts: Sequence[str]) -> dict[str, float]:
    """What reward hacking shows first in the responses' texts.

    `text/repeated` is the share of four-word sequences that stood in the same response before, over
    all responses together; `text/code_fences` the mean number of code fences, which a reward model
    trained on programming answers can be pleased with alone (the StackLLaMA report saw both).

    Args:
        texts: The iteration's responses, as people read them.
    """
    repeated = total = 0
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[start:] for start in range(NGRAM)), strict=False))
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return {
        "text/repeated": repeated / max(total, 1),
        "text/code_fences": sum(text.count("```") for text in texts) / len(texts),
    }
