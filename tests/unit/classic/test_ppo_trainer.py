"""The three calls: generation, statistics, learning, references, trackers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import PreTrainedTokenizerFast

from suasion.classic import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
    set_seed,
)

from .conftest import FAMILIES, batch_of, tiny

Make = Callable[..., PPOTrainer]
Build = Callable[..., AutoModelForCausalLMWithValueHead]
PUBLISHED = [
    "objective/kl",
    "objective/kl_dist",
    "objective/logprobs",
    "objective/ref_logprobs",
    "objective/kl_coef",
    "objective/entropy",
    "ppo/mean_non_score_reward",
    "ppo/mean_scores",
    "ppo/std_scores",
    "tokens/queries_len_mean",
    "tokens/queries_len_std",
    "tokens/queries_dist",
    "tokens/responses_len_mean",
    "tokens/responses_len_std",
    "tokens/responses_dist",
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/loss/total",
    "ppo/policy/entropy",
    "ppo/policy/approxkl",
    "ppo/policy/policykl",
    "ppo/policy/clipfrac",
    "ppo/policy/advantages",
    "ppo/policy/advantages_mean",
    "ppo/policy/ratio",
    "ppo/returns/mean",
    "ppo/returns/var",
    "ppo/val/vpred",
    "ppo/val/error",
    "ppo/val/clipfrac",
    "ppo/val/mean",
    "ppo/val/var",
    "ppo/val/var_explained",
    "ppo/learning_rate",
    "time/ppo/forward_pass",
    "time/ppo/compute_rewards",
    "time/ppo/compute_advantages",
    "time/ppo/optimize_step",
    "time/ppo/calc_stats",
    "time/ppo/total",
]
SAMPLING = {"do_sample": True, "top_k": 0.0, "top_p": 1.0, "min_length": -1}


def test_all_published_statistics_are_there(trainer: Make) -> None:
    """Floats where one number was published, arrays where many were."""
    stats = trainer(ppo_epochs=2, mini_batch_size=2).step(*batch_of(4))
    assert not set(PUBLISHED) - stats.keys()
    arrays = {k for k, v in stats.items() if isinstance(v, np.ndarray)}
    assert all(type(v) is float for k, v in stats.items() if k not in arrays)
    assert arrays == {
        "objective/kl_dist", "objective/logprobs", "objective/ref_logprobs",
        "ppo/policy/advantages", "ppo/policy/ratio", "tokens/queries_dist", "tokens/responses_dist",
    }  # fmt: skip
    assert stats["objective/kl_dist"].shape == (4,)
    assert stats["ppo/policy/ratio"].shape == (2 * (5 + 2 + 1 + 6),)  # two epochs of all tokens
    assert stats["objective/kl_coef"] == 0.2
    assert stats["tokens/responses_len_mean"] == 3.5


def test_a_single_query_of_a_single_token(trainer: Make) -> None:
    """The smallest batch there is has no variance and no NaN weight."""
    one = trainer(batch_size=1, mini_batch_size=1, init_kl_coef=0.0)
    stats = one.step([torch.tensor([5, 6])], [torch.tensor([7])], [torch.tensor([1.0])])
    assert stats["ppo/std_scores"] == 0.0
    assert stats["ppo/policy/ratio"] == pytest.approx([1.0])
    assert np.isnan(stats["ppo/val/var_explained"])


def test_lengths_come_from_the_tensors_and_not_from_padding(trainer: Make) -> None:
    """A response of padding tokens is a response."""
    queries, responses, scores = batch_of(4)
    trainer_ = trainer()
    pad, eos = trainer_.tokenizer.pad_token_id, trainer_.tokenizer.eos_token_id
    responses[0] = torch.tensor([7, pad, pad, eos, eos])
    stats = trainer_.step(queries, responses, scores)
    assert stats["tokens/responses_dist"][0] == 5
    assert np.count_nonzero(stats["objective/logprobs"][0]) == 5


def test_an_adaptive_coefficient_falls_while_the_kl_is_under_its_target(trainer: Make) -> None:
    """By the bounded error times batch over horizon."""
    adaptive, fixed = trainer(), trainer(adap_kl_ctrl=False)
    adaptive.step(*batch_of(4))
    fixed.step(*batch_of(4))
    assert adaptive.kl_ctl.value == pytest.approx(0.2 * (1 - 0.2 * 4 / 10000))
    assert fixed.kl_ctl.value == 0.2


def test_scores_are_scaled_and_clipped_as_configured(trainer: Make) -> None:
    """By the running spread, with or without the mean, then clipped."""
    queries, responses, _ = batch_of(4)
    scores = [torch.tensor(value) for value in (1.0, 2.0, 3.0, 10.0)]
    spread = float(torch.stack(scores).std())
    scaled = trainer(use_score_scaling=True).step(queries, responses, scores)
    assert scaled["ppo/mean_scores"] == pytest.approx(4.0 / spread)
    normed = trainer(use_score_scaling=True, use_score_norm=True)
    assert normed.step(queries, responses, scores)["ppo/mean_scores"] == pytest.approx(0, abs=1e-6)
    clipped = trainer(score_clip=2.0).step(queries, responses, scores)
    assert clipped["ppo/mean_scores"] == pytest.approx(7 / 4)
    whitened = trainer(whiten_rewards=True).step(queries, responses, scores)
    assert whitened["ppo/returns/mean"] != pytest.approx(clipped["ppo/returns/mean"])


def test_early_stopping_and_the_ratio_threshold(trainer: Make) -> None:
    """The one ends the updates, the other leaves weights untouched."""
    queries, responses, scores = batch_of(4)
    far = trainer(
        early_stopping=True, target_kl=1e-3, learning_rate=1.0, ppo_epochs=20, score_clip=5.0
    )
    stats = far.step(queries, responses, [10 * s for s in scores])
    assert stats["ppo/stopped_early"] == 1.0
    assert stats["ppo/updates"] < 20
    wild = trainer(ratio_threshold=1e-3)  # below any ratio: every mini-batch is left out
    before = {k: v.clone() for k, v in wild.model.state_dict().items()}
    assert wild.step(queries, responses, scores)["ppo/skipped"] == 1.0
    for name, weight in wild.model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_negative_kl_is_noticed(tokenizer: PreTrainedTokenizerFast, with_head: Build) -> None:
    """Responses of another model than the policy."""
    model = with_head()
    trainer = PPOTrainer(
        PPOConfig(batch_size=4, mini_batch_size=4), model, tiny(tokenizer, seed=9), tokenizer
    )
    queries, _, scores = batch_of(4)
    reference = trainer.ref_model  # its own samples look unlikely to the policy
    responses = list(respond_to_batch(reference, torch.stack([q[:1] for q in queries]), 8))
    with pytest.warns(UserWarning, match="not samples of the policy"):
        trainer.step([q[:1] for q in queries], responses, scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_greedy_generation_is_one_by_one_generation(
    trainer: Make, with_head: Build, family: str
) -> None:
    """Padding on the left changes nothing, in any family."""
    trainer_ = trainer(with_head(family))
    queries = batch_of(4)[0]
    options = {"max_new_tokens": 6, "do_sample": False, "return_prompt": False}
    together = trainer_.generate(queries, **options)
    alone = [trainer_.generate(query, **options)[0] for query in queries]
    for a, b in zip(together, alone, strict=True):
        assert a.tolist() == b.tolist()


def test_a_response_keeps_its_eos_and_loses_its_padding(trainer: Make) -> None:
    """Even where both are one token."""
    trainer_ = trainer()
    eos = trainer_.tokenizer.eos_token_id
    trainer_.tokenizer.pad_token_id = eos
    try:
        trainer_.model.pretrained_model.get_output_embeddings().weight.data[eos] = 0.0
        set_seed(3)
        found = trainer_.generate(
            batch_of(40)[0], batch_size=40, return_prompt=False, max_new_tokens=30,
            temperature=3.0, **SAMPLING,
        )  # fmt: skip
    finally:
        trainer_.tokenizer.pad_token = "<|pad|>"  # noqa: S105  no password
    ended = [row for row in found if row[-1] == eos]
    assert ended
    assert all(int((row == eos).sum()) <= 1 for row in found)
    assert any(1 < len(row) < 30 for row in ended)


def test_generate_with_lengths_prompts_and_reference(trainer: Make) -> None:
    """All published arguments of `generate`."""
    trainer_ = trainer()
    queries = batch_of(3)[0]
    lengths = LengthSampler(3, 4)
    found, other = trainer_.generate(
        queries, length_sampler=lengths, generate_ref_response=True, do_sample=False
    )
    for query, response, reference in zip(queries, found, other, strict=True):
        assert response[: len(query)].tolist() == query.tolist()
        assert len(response) <= len(query) + 3
        assert response.tolist() == reference.tolist()  # both are the same model still
    assert trainer_.generate(queries[0], max_new_tokens=2).ndim == 2


def test_length_sampler_never_draws_its_maximum() -> None:
    """As published: the interval is half open."""
    assert {LengthSampler(2, 5)() for _ in range(200)} == {2, 3, 4}


def test_respond_to_batch_gives_exactly_the_length_asked_for(with_head: Build) -> None:
    """No token ends a response early."""
    assert respond_to_batch(with_head(), torch.tensor([[5, 6], [7, 8]]), 7).shape == (2, 7)


def test_a_rewarded_token_is_said_more_often(
    tokenizer: PreTrainedTokenizerFast, with_head: Build
) -> None:
    """Fifteen steps make a model say what it is paid for."""
    model = with_head()
    trainer = PPOTrainer(
        PPOConfig(batch_size=32, mini_batch_size=16, learning_rate=1e-2, init_kl_coef=0.01),
        model,
        tokenizer=tokenizer,
    )
    queries = [torch.tensor([5 + i % 7]) for i in range(32)]
    shares: list[float] = []
    wanted = None
    for _ in range(15):
        responses = trainer.generate(
            queries, batch_size=32, return_prompt=False, max_new_tokens=8, **SAMPLING
        )
        if wanted is None:
            wanted = torch.cat(responses).mode().values
        scores = [(response == wanted).float().mean() for response in responses]
        trainer.step(queries, responses, scores)
        shares.append(float(torch.stack(scores).mean()))
    assert np.mean(shares[-3:]) > np.mean(shares[:3]) + 0.2


def test_adapters_off_is_the_reference_and_only_adapters_learn(
    trainer: Make, with_head: Build
) -> None:
    """KL is zero at first, moves, and the base stays."""
    lora = LoraConfig(r=4, target_modules=["c_attn"], lora_dropout=0.1)
    model = with_head("gpt2", peft_config=lora)
    trainer_ = trainer(model, learning_rate=1e-2)
    assert trainer_.ref_model is None
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert trainer_.step(*batch_of(4))["objective/kl"] == pytest.approx(0, abs=1e-5)
    second = trainer_.step(*batch_of(4))
    assert abs(second["objective/kl"]) > 1e-4
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert all("lora" in k or "v_head" in k for k in moved)
    assert any("lora" in k for k in moved)
    options = {"max_new_tokens": 4, "do_sample": False, "generate_ref_response": True}
    assert len(trainer_.generate(batch_of(2)[0], **options)) == 2


def test_reference_with_shared_layers_stays_where_it_was(trainer: Make, with_head: Build) -> None:
    """Sharing storage with a model that trains must not move it."""
    model = with_head()
    trainer_ = trainer(model, {"num_shared_layers": 1}, learning_rate=1e-2)
    before = {k: v.clone() for k, v in trainer_.ref_model.state_dict().items()}
    trainer_.step(*batch_of(4))
    for name, weight in trainer_.ref_model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    with pytest.warns(UserWarning, match="num_shared_layers is not used"):
        trainer(with_head(), {"num_shared_layers": 1, "ref_model": create_reference_model(model)})


def test_gradient_checkpointing_changes_nothing(trainer: Make, with_head: Build) -> None:
    """Not even in training mode: dropout is off."""
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = with_head("llama", v_head_init_strategy="normal")
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        stats = trainer(model, ppo_epochs=3, learning_rate=1e-3).step(*batch_of(4))
        losses.append(stats["ppo/loss/total"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_any_optimizer_and_schedule(trainer: Make, with_head: Build) -> None:
    """The schedule moves once per step, after the rate was reported."""
    model = with_head()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    trainer_ = trainer(model, {"optimizer": optimizer, "lr_scheduler": schedule})
    rates = [trainer_.step(*batch_of(4))["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.01, 0.005, 0.0025])


def test_the_dataloader_shuffles_drops_the_rest_and_unused_columns(trainer: Make) -> None:
    """Ten rows make two batches of four."""
    rows = Dataset.from_dict(
        {"query": [f"q{i}" for i in range(10)], "input_ids": [[5, 6]] * 10, "stars": [1] * 10}
    )
    parts = {
        "dataset": rows,
        "data_collator": lambda rows: {k: [r[k] for r in rows] for k in rows[0]},
    }
    batches = list(trainer(None, parts).dataloader)
    assert len(batches) == 2
    assert all(batch.keys() == {"query", "input_ids"} for batch in batches)
    seen = [query for batch in batches for query in batch["query"]]
    assert len(set(seen)) == 8
    assert seen != sorted(seen)


def test_log_stats_reaches_tensorboard(trainer: Make, tmp_path: Path) -> None:
    """Scalars as scalars, arrays as histograms."""
    trainer_ = trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = batch_of(4)
    stats = trainer_.step(queries, responses, scores)
    trainer_.log_stats(stats, {"query": ["a"] * 4, "response": ["b"] * 4}, scores)
    trainer_.accelerator.end_training()
    files = [path for path in tmp_path.rglob("events.*") if path.parent.name == "trl"]
    events = EventAccumulator(str(files[0].parent)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"env/reward_mean", "env/reward_std", "objective/kl", "ppo/loss/value"} <= scalars
    assert "env/reward_dist" in events.Tags()["histograms"]
    mean = events.Scalars("env/reward_mean")[0]
    assert mean.value == pytest.approx(float(torch.stack(scores).mean()))


def test_log_stats_makes_a_table_for_wandb(trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, responses and rewards, side by side."""
    trainer_ = trainer()
    logged: list[dict[str, Any]] = []

    class Wandb:
        @staticmethod
        def Table(columns: list[str], rows: list[list[Any]]) -> Any:  # noqa: N802  their name
            return columns, rows

    monkeypatch.setitem(__import__("sys").modules, "wandb", Wandb)
    monkeypatch.setattr(trainer_._tracking, "_kind", "wandb")  # noqa: SLF001  no wandb here
    monkeypatch.setattr(trainer_.accelerator, "log", lambda logs, **_: logged.append(logs))
    batch = {"query": ["a", "b"], "response": ["c", "d"]}
    trainer_.log_stats({}, batch, [torch.tensor(1.0), torch.tensor(2.0)])
    assert logged[0]["game_log"] == (
        ["query", "response", "reward"],
        [["a", "c", 1.0], ["b", "d", 2.0]],
    )
    with pytest.raises(ValueError, match="no column topic"):
        trainer_.log_stats({}, batch, torch.tensor([1.0, 2.0]), columns_to_log=["topic"])


def test_save_pretrained_and_best_model_upload(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload only where the mean score is the best so far."""
    trainer_ = trainer(push_to_hub_if_best_kwargs={"repo_id": "mine"})
    pushed: list[float] = []
    monkeypatch.setattr(trainer_, "push_to_hub", lambda **_: pushed.append(trainer_.highest_reward))
    queries, responses, scores = batch_of(4)
    for shift in (0.0, -1.0, 1.0):
        trainer_.step(queries, responses, [score + shift for score in scores])
    assert len(pushed) == 2
    trainer_.save_pretrained(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json"} <= names
