"""What old code did wrong without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from suasion.classic import (
    ArgumentError,
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
)
from suasion.core.errors import RewardError, TrainingError

from .conftest import batch_of, tiny

Make = Callable[..., PPOTrainer]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10, "mini_batch_size": 4}, "not a multiple of mini_batch_size 4"),
        ({"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 4}, "= 16"),
        ({"batch_size": 0}, "batch_size is 0, not a whole number above 0"),
        ({"ppo_epochs": 1.5}, "ppo_epochs is 1.5"),
        ({"kl_penalty": "k3"}, "choose kl, abs, mse or full"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"lam": 1.1}, r"not in 0\.\.1"),
        ({"init_kl_coef": -0.1}, "init_kl_coef"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"use_score_norm": True}, "use_score_scaling=True"),
        ({"log_with": "paper"}, "choose one of tensorboard"),
    ],
)
def test_configurations_no_run_can_be_made_with(settings: dict[str, Any], message: str) -> None:
    """The message names the field and its value."""
    with pytest.raises(ArgumentError, match=message):
        PPOConfig(**settings)


def test_old_names_of_settings_still_work() -> None:
    """With a word about their new names."""
    with pytest.warns(FutureWarning, match="mini_batch_size"):
        assert PPOConfig(batch_size=8, forward_batch_size=4).mini_batch_size == 4
    with pytest.warns(FutureWarning, match="optimize_device_cache"):
        assert PPOConfig(optimize_cuda_cache=True).optimize_device_cache


def test_published_defaults() -> None:
    """Those of the library's last version."""
    config = PPOConfig()
    found = (config.steps, config.learning_rate, config.init_kl_coef, config.target, config.horizon)
    assert found == (20000, 1.41e-5, 0.2, 6, 10000)
    found = (config.gamma, config.lam, config.cliprange, config.cliprange_value, config.vf_coef)
    assert found == (1, 0.95, 0.2, 0.2, 0.1)
    assert (config.batch_size, config.mini_batch_size, config.ppo_epochs) == (128, 128, 4)
    assert config.to_dict()["ratio_threshold"] == 10


def _replaced(index: int, entry: Any) -> Callable[[Any], Any]:
    return lambda rows: [entry if i == index else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, torch.stack, "queries must be a list of tensors, not Tensor"),
        (0, tuple, "not tuple"),
        (1, lambda rows: rows[:3], "responses has 3 entries, PPOConfig.batch_size is 4"),
        (1, _replaced(2, [1, 2]), r"responses\[2\] is a list"),
        (1, _replaced(1, torch.ones(1, 3).long()), r"responses\[1\] has shape \(1, 3\)"),
        (1, _replaced(1, torch.ones(3)), "not token ids"),
        (1, _replaced(3, torch.ones(0).long()), r"responses\[3\] is empty"),
        (0, _replaced(0, torch.ones(0).long()), r"queries\[0\] is empty"),
        (2, _replaced(0, 1.0), r"scores\[0\] is a float, not a tensor"),
        (2, torch.stack, "scores must be a list"),
        (2, _replaced(1, torch.ones(2)), r"scores\[1\] has shape \(2,\)"),
        (2, _replaced(1, torch.ones(1, 1)), r"scores\[1\] has shape \(1, 1\)"),
    ],
)
def test_arguments_of_step(
    trainer: Make, argument: int, change: Callable[[Any], Any], message: str
) -> None:
    """The message names the argument and the row."""
    batch = list(batch_of(4))
    if change is torch.stack:
        batch[argument] = [row.reshape(-1)[:1] for row in batch[argument]]
    batch[argument] = change(batch[argument])
    with pytest.raises(ValueError, match=message):
        trainer().step(*batch)


def test_scores_and_masks_that_make_no_sense(trainer: Make) -> None:
    """Neither NaN nor masks of another length."""
    queries, responses, scores = batch_of(4)
    with pytest.raises(RewardError, match=r"scores\[2\] is nan"):
        trainer().step(queries, responses, [*scores[:2], torch.tensor(torch.nan), scores[3]])
    masks = [torch.ones(len(response)) for response in responses]
    with pytest.raises(ArgumentError, match=r"response_masks\[1\] has shape"):
        trainer().step(queries, responses, scores, [masks[0], torch.ones(9), *masks[2:]])
    with pytest.raises(ArgumentError, match="counts no token"):
        trainer().step(queries, responses, scores, [torch.zeros(len(responses[0])), *masks[1:]])


def test_a_loss_that_is_not_finite_stops_the_run(trainer: Make) -> None:
    """Nothing is trained on after it."""
    trainer_ = trainer()
    trainer_.model.v_head.summary.bias.data.fill_(torch.inf)
    with pytest.raises((TrainingError, ValueError)):
        trainer_.step(*batch_of(4))


def test_parts_that_do_not_fit(
    tokenizer: PreTrainedTokenizerFast,
    with_head: Callable[..., AutoModelForCausalLMWithValueHead],
    trainer: Make,
) -> None:
    """The constructor says which part and what it is instead."""
    config, model = PPOConfig(batch_size=4, mini_batch_size=4), with_head()
    with pytest.raises(ArgumentError, match="not a PPOConfig"):
        PPOTrainer({"batch_size": 4}, model, tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="wrap it"):
        PPOTrainer(config, tiny(tokenizer), tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="not a tokenizer"):
        PPOTrainer(config, model)
    with pytest.raises(ArgumentError, match="very model that is trained"):
        PPOTrainer(config, model, model, tokenizer)
    with pytest.raises(ArgumentError, match="ref_model is a str"):
        PPOTrainer(config, model, "gpt2", tokenizer)
    stranger = torch.optim.SGD(with_head().parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match="holds no parameter of the model"):
        trainer(model, {"optimizer": stranger})
    with pytest.raises(ArgumentError, match="not a torch optimizer"):
        trainer(model, {"optimizer": "adam"})
    with pytest.raises(ArgumentError, match="schedule"):
        trainer(model, {"lr_scheduler": 0.5})
    with pytest.raises(ArgumentError, match="less than one batch"):
        trainer(model, {"dataset": Dataset.from_dict({"query": ["a"]})})
    with pytest.raises(ArgumentError, match="no folder"):
        trainer(model, log_with="tensorboard")
    config.batch_size = 3
    with pytest.raises(ArgumentError, match="multiple"):
        PPOTrainer(config, model, tokenizer=tokenizer)


def test_queries_that_cannot_be_answered(trainer: Make) -> None:
    """Batched, empty or untyped queries, and several answers at once."""
    trainer_ = trainer()
    for query in (torch.ones(1, 3).long(), torch.ones(0).long()):
        with pytest.raises(ArgumentError, match="one axis"):
            trainer_.generate(query, max_new_tokens=2)
    with pytest.raises(ArgumentError, match="query 1 is list"):
        trainer_.generate([torch.tensor([5]), [5]], max_new_tokens=2)
    with pytest.raises(ArgumentError, match="num_return_sequences"):
        trainer_.generate(
            [torch.tensor([5])], max_new_tokens=2, do_sample=True, num_return_sequences=2
        )
    with pytest.raises(ArgumentError, match="no length to draw"):
        LengthSampler(4, 4)
