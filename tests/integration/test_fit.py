"""Training on the library's Trainer: it learns, goes on after a stop, batches as it should."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from rich.console import Console
from torch import Tensor

from suasion.config.schema import LoraConfig, SftConfig
from suasion.core.files import read_json_lines
from suasion.models import lowrank
from suasion.models.adapters import add_lora
from suasion.models.load import fresh_causal_lm, train_tokenizer
from suasion.models.roles import Policy
from suasion.trainers import fit as fitting
from suasion.trainers.fit import fit
from suasion.trainers.packed import Blocks, causal_lm_loss

BLOCK = 16
ROWS = 32


class Stopped(Exception):  # noqa: N818 (it is no error)
    """Stands for whatever ends a run."""


def blocks() -> Blocks:
    """The same few random blocks again and again: easy to learn by heart."""
    ids = torch.randint(2, 60, (4, BLOCK), generator=torch.Generator().manual_seed(0))
    return Blocks(ids.repeat(ROWS // 4, 1).numpy())


def model_of(*, lora: bool = False, dropout: float = 0.3) -> Any:
    """The same fresh model each time; adapters with dropout, so that randomness counts."""
    tokenizer = train_tokenizer(["a few words"], 260)
    model = fresh_causal_lm(
        family="llama", tokenizer=tokenizer, context=32, hidden_size=32, layers=1, heads=2, seed=1
    )
    if not lora:
        return model
    torch.manual_seed(2)
    return add_lora(model, LoraConfig(r=4, dropout=dropout))


def config_of(**changes: Any) -> SftConfig:
    """Twelve steps."""
    given = {"max_steps": 12, "batch_size": 8, "log_every": 5, "save_every": 2, "track": ()}
    return SftConfig(**{**given, "learning_rate": 1e-2, **changes})


def train(model: Any, folder: Path, config: SftConfig, **options: Any) -> dict[str, Any]:
    """Fit, without a word."""
    console = Console(file=io.StringIO())
    loss = options.pop("loss", None) or partial(causal_lm_loss, Policy(model, 1.0))
    return fit(
        model,
        blocks(),
        Blocks.collate,
        loss,
        config,
        folder=folder,
        seed=1,
        console=console,
        title="t",
        **options,
    )


def learnt(model: Any) -> dict[str, Tensor]:
    """Parameters that learn."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_the_loss_falls(tmp_path: Path) -> None:
    """From that of guessing; the reported mean is the mean of what was logged."""
    outcome = train(model_of(), tmp_path, config_of(log_every=1))
    rows = list(read_json_lines(tmp_path / "metrics.jsonl"))
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert losses[0] == pytest.approx(torch.log(torch.tensor(260.0)).item(), rel=0.1)
    assert losses[-1] < losses[0] - 1
    mean = pytest.approx(sum(losses) / 12)
    assert outcome == {"steps": 12.0, "loss": mean, "arithmetic": "float32"}


def test_the_loss_is_the_librarys() -> None:
    """In chunks, without logits of all positions: the same number and the same gradients."""
    found = []
    for own in (True, False):
        model = model_of()
        ids = torch.stack([blocks()[row] for row in range(3)])
        loss = (
            causal_lm_loss(Policy(model, 1.0), {"input_ids": ids})
            if own
            else model(input_ids=ids, labels=ids).loss
        )
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_adapters_in_bf16_learn_the_same_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer and its adapter are one function, which learns what the two apart learn."""
    used: list[int] = []
    usual = lowrank._AtOnce.apply  # noqa: SLF001

    def counted(*arguments: Any) -> Any:
        used.append(1)
        return usual(*arguments)

    found = []
    for at_once in (True, False):
        with monkeypatch.context() as patched:
            patched.setattr(lowrank._AtOnce, "apply", counted)  # noqa: SLF001
            if not at_once:
                patched.setattr(lowrank, "is_plain", lambda _: False)
            model = model_of(lora=True, dropout=0.0)
            train(model, tmp_path / str(at_once), config_of(precision="bf16"))
        rows = read_json_lines(tmp_path / str(at_once) / "metrics.jsonl")
        found.append([row["loss"] for row in rows])
    layers = sum(isinstance(module, LoraLayer) for module in model_of(lora=True).modules())
    assert len(used) == 12 * layers
    assert found[0] == pytest.approx(found[1], abs=0.02)
    assert found[0][-1] < found[0][0] - 0.1


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, lora: bool, stop: int
) -> None:
    """Same weights, same metrics, though logging, saving and stopping do not coincide."""
    whole = model_of(lora=lora)
    outcome = train(whole, tmp_path / "whole", config_of())
    journal = fitting._Journal.on_step_end  # noqa: SLF001 (the one place to stop at a step)

    def stopping(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        journal(self, args, state, control, **more)
        if state.global_step == stop:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(fitting._Journal, "on_step_end", stopping)  # noqa: SLF001
        with pytest.raises(Stopped):
            train(model_of(lora=lora), tmp_path / "part", config_of())
    resumed = model_of(lora=lora)
    assert train(resumed, tmp_path / "part", config_of()) == outcome
    for name, value in learnt(whole).items():
        assert torch.equal(learnt(resumed)[name], value), name
    rows = [list(read_json_lines(tmp_path / run / "metrics.jsonl")) for run in ("whole", "part")]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == [5, 10]


@pytest.mark.parametrize("own_loss", [False, True])
def test_accumulation_is_a_larger_batch(tmp_path: Path, *, own_loss: bool) -> None:
    """1 x 8 = 8 x 1: what fits into memory decides nothing."""

    def squares(policy: Policy, batch: dict[str, Any]) -> Tensor:
        ids = batch["input_ids"]
        logits = policy.logits(policy(ids, torch.ones_like(ids)).last_hidden_state)
        return (logits**2).mean() + causal_lm_loss(policy, batch)

    found = []
    for size, passes in ((8, 1), (1, 8)):
        model = model_of()
        config = config_of(batch_size=size, accumulate=passes, max_steps=3)
        options = {"loss": partial(squares, Policy(model, 1.0))} if own_loss else {}
        outcome = train(model, tmp_path / str(size), config, **options)
        found.append((outcome["loss"], learnt(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, atol=1e-4, rtol=1e-3)
