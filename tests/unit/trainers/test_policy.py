"""Invariants of the policy update, and what a checkpoint brings back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from suasion.core.seeding import generator
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.models.references import FrozenReference
from suasion.models.roles import Policy, TrunkCritic, hidden_size_of
from suasion.rollout.experience import Experience, build_experience
from suasion.rollout.sampler import sample
from suasion.trainers.checkpoint import KEEP, load_newest, save_checkpoint
from suasion.trainers.policy import PolicyTrainer, UpdateSettings
from tests.unit.conftest import tiny_model

ROWS = 8
QUERIES = [[5 + row, 9, 12][: 1 + row % 3] for row in range(ROWS)]


def experience_of(policy: Policy, critic: TrunkCritic) -> Experience:
    """Eight sampled responses of different lengths with random scores."""
    rollout = sample(
        policy,
        QUERIES,
        [2 + row for row in range(ROWS)],
        [torch.rand(16, generator=generator(1, row), dtype=torch.float64) for row in range(ROWS)],
        stop_ids=(299,),
        pad_id=0,
        value=critic.of,
    )
    return build_experience(
        rollout,
        torch.randn(ROWS, generator=generator(2)),
        policy=policy,
        reference=FrozenReference.copy_of(policy),
        critic=critic,
        estimate=gae,
        kl_coef=0.1,
        whiten_advantages=True,
        pad_id=0,
        batch_tokens=64,
    )


def trainer_of(
    *, optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW, **changes: Any
) -> PolicyTrainer:
    """A trainer of a fresh tiny model, the same each time."""
    policy = Policy(tiny_model("gpt2"), 1.0)
    critic = TrunkCritic(hidden_size_of(policy))
    with torch.no_grad():
        critic.module.weight.copy_(torch.linspace(-0.1, 0.1, 32)[None])
    parameters = [*policy.model.parameters(), *critic.module.parameters()]
    chosen = optimizer(parameters, lr=1e-2)
    settings = {
        "epochs": 1,
        "mini_batch_size": ROWS,
        "micro_batch_tokens": 10_000,
        "max_grad_norm": 1e9,
        "value_coef": 0.5,
    }
    return PolicyTrainer(
        policy,
        critic,
        chosen,
        torch.optim.lr_scheduler.LambdaLR(chosen, lambda step: 1.0 / (1 + step)),
        partial(clipped_surrogate, clip_low=0.2, clip_high=0.2),
        partial(clipped_value_loss, clip=0.2),
        UpdateSettings(**{**settings, **changes}),
        pad_id=0,
        autocast=nullcontext,
    )


def train(
    trainer: PolicyTrainer, experience: Experience, step: int = 0, **options: Any
) -> dict[str, float]:
    """One iteration's updates."""
    return trainer.optimise(experience, generator(3, "mini", step), **options)


def experience_for(trainer: PolicyTrainer) -> Experience:
    """Of this trainer's own policy."""
    assert isinstance(trainer.critic, TrunkCritic)
    return experience_of(trainer.policy, trainer.critic)


def weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    """Everything that learns."""
    named = [*trainer.policy.model.named_parameters(), *trainer.critic.module.named_parameters()]
    return {name: parameter.detach().clone() for name, parameter in named}


def test_backward_passes_have_adapters_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy's and the critic's, where they have any."""
    trainer = trainer_of(micro_batch_tokens=40)
    experience = experience_for(trainer)
    inside: list[tuple[object, ...]] = []
    seen: list[tuple[object, ...]] = []
    backward = trainer._backward  # noqa: SLF001

    @contextmanager
    def watched(*models: object) -> Iterator[None]:
        inside.append(models)
        yield
        inside.pop()

    def step(*arguments: Any, **named: Any) -> None:
        seen.extend(inside)
        backward(*arguments, **named)

    monkeypatch.setattr("suasion.trainers.policy.adapters_at_once", watched)
    monkeypatch.setattr(trainer, "_backward", step)
    train(trainer, experience)
    assert len(seen) > 1
    assert set(seen) == {(trainer.policy.model, trainer.critic.module)}


def test_the_first_mini_batch_starts_where_the_rollout_was() -> None:
    """Ratio 1, no divergence, nothing clipped; later ones have moved (negative control)."""
    trainer = trainer_of(mini_batch_size=4, epochs=2)
    stats = train(trainer, experience_for(trainer))
    assert stats["ppo/policy/first_ratio_error"] < 1e-5
    assert stats["ppo/policy/first_approxkl"] < 1e-10
    assert stats["ppo/updates"] == 4
    assert stats["ppo/policy/ratio_error"] > 1e-3
    assert stats["ppo/policy/approxkl"] > 1e-6


@pytest.mark.parametrize("tokens", [1, 20, 40])
@pytest.mark.parametrize("entropy", [0.0, 0.05])
def test_micro_batches_do_not_change_the_gradient(tokens: int, entropy: float) -> None:
    """One row at a time, or all at once: one division by all tokens."""
    gradients = []
    for budget in (10_000, tokens):
        trainer = trainer_of(
            optimizer=partial(torch.optim.SGD), micro_batch_tokens=budget, entropy_coef=entropy
        )
        before = weights(trainer)
        stats = train(trainer, experience_for(trainer))
        after = weights(trainer)
        gradients.append({name: (before[name] - after[name]) / 1e-2 for name in before})
        assert stats["ppo/grad_norm"] > 1e-3
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=2e-5, rtol=1e-4)


def test_gradients_of_micro_batches_add_up_exactly() -> None:
    """The gradients themselves, before any optimizer rounds them."""
    found = []
    for budget in (10_000, 1):
        trainer = trainer_of(optimizer=partial(torch.optim.SGD), micro_batch_tokens=budget)
        experience = experience_for(trainer)
        kept: dict[str, torch.Tensor] = {}

        def keep(*_: Any, trainer: PolicyTrainer = trainer, kept: Any = kept) -> None:
            kept.update({n: p.grad.clone() for n, p in trainer.policy.model.named_parameters()})

        trainer.optimizer.register_step_pre_hook(keep)
        train(trainer, experience)
        found.append(kept)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_the_update_raises_what_did_better_than_expected() -> None:
    """Log-probabilities move with the advantages."""
    trainer = trainer_of(optimizer=partial(torch.optim.SGD))
    experience = experience_for(trainer)
    train(trainer, experience)
    new = trainer.policy.logprobs(experience.batch(range(ROWS), 0))[0].detach()
    moved = new - experience.logprobs[experience.mask]
    assert float((moved * experience.advantages[experience.mask]).sum()) > 0


def test_equal_returns_leave_nothing_to_explain() -> None:
    """A batch in which every return is the same is no error: its figures are finite."""
    trainer = trainer_of()
    experience = experience_for(trainer)
    flat = replace(experience, returns=torch.zeros_like(experience.returns))
    stats = trainer.optimise(flat, generator(1))
    assert stats["ppo/val/var_explained"] == 0.0
    assert all(math.isfinite(value) for value in stats.values())
    assert trainer.optimise(experience, generator(1))["ppo/val/var_explained"] != 0.0


def test_a_warming_critic_leaves_the_policy_alone() -> None:
    """Only the value head moves."""
    trainer = trainer_of()
    before = weights(trainer)
    train(trainer, experience_for(trainer), critic_only=True)
    moved = {
        name for name, value in weights(trainer).items() if not torch.equal(value, before[name])
    }
    assert moved == {"weight", "bias"}


def test_updates_stop_when_the_policy_went_too_far() -> None:
    """The step that found out is not made."""
    trainer = trainer_of(kl_stop=1e-9, epochs=5)
    stats = train(trainer, experience_for(trainer))
    assert stats["ppo/stopped_early"] == 1
    assert stats["ppo/updates"] < 5


def test_gradients_are_clipped() -> None:
    """The step's length is bounded, the reported norm is the one before."""
    trainer = trainer_of(optimizer=partial(torch.optim.SGD), max_grad_norm=1e-3)
    before = weights(trainer)
    stats = train(trainer, experience_for(trainer))
    after = weights(trainer)
    moved = sum(float(((after[n] - before[n]) ** 2).sum()) for n in before) ** 0.5
    assert stats["ppo/grad_norm"] > 1e-3
    assert moved == pytest.approx(1e-2 * 1e-3, rel=0.05)


def modules(trainer: PolicyTrainer) -> dict[str, torch.nn.Module]:
    """What a checkpoint holds."""
    return {"policy": trainer.policy.model, "critic": trainer.critic.module}


def save(trainer: PolicyTrainer, folder: Path, step: int) -> Path:
    """A checkpoint with a little state."""
    state = {"kl_coef": 0.1 + step, "moments": {"count": 3}}
    return save_checkpoint(
        folder, step, modules(trainer), trainer.optimizer, trainer.schedule, state
    )


def test_a_checkpoint_brings_everything_back(tmp_path: Path) -> None:
    """Going on from it gives the same bits as never having stopped."""
    whole = trainer_of()
    experience = experience_for(whole)
    train(whole, experience, 0)
    save(whole, tmp_path, 1)
    train(whole, experience, 1)
    resumed = trainer_of()
    state, refused = load_newest(tmp_path, modules(resumed), resumed.optimizer, resumed.schedule)
    assert refused == []
    assert state == {"step": 1, "kl_coef": 1.1, "moments": {"count": 3}}
    train(resumed, experience, 1)
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    """One to fall back on."""
    trainer = trainer_of()
    for step in (1, 2, 3, 4):
        save(trainer, tmp_path, step)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000003", "step-00000004"]
    assert len(names) == KEEP


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: (c / "state.safetensors").write_bytes(
            (c / "state.safetensors").read_bytes()[:-8]
        ),
        lambda c: (c / "state.safetensors").unlink(),
        lambda c: (c / "state.json").write_text("{", "utf-8"),
        lambda c: (c / "state.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """And named; the one before it is used; without any, the run starts anew."""
    trainer = trainer_of()
    older, newer = save(trainer, tmp_path, 1), save(trainer, tmp_path, 2)
    load = partial(load_newest, tmp_path, modules(trainer), trainer.optimizer, trainer.schedule)
    damage(newer)
    state, refused = load()
    assert state is not None
    assert state["step"] == 1
    assert len(refused) == 1
    assert f"{newer} is damaged" in refused[0]
    damage(older)
    state, refused = load()
    assert state is None
    assert len(refused) == 2


def test_leftovers_of_a_kill_are_no_checkpoints(tmp_path: Path) -> None:
    """Folders that were being written or replaced."""
    trainer = trainer_of()
    saved = save(trainer, tmp_path, 1)
    saved.rename(tmp_path / "step-00000009.partial")
    found = load_newest(tmp_path, modules(trainer), trainer.optimizer, trainer.schedule)
    assert found == (None, [])
