"""Adapters on one base: the wrong order is refused, and what it would do is shown without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from suasion.config.schema import LoraConfig
from suasion.core.errors import ModelError, TrainingError
from suasion.models import scope as scopes
from suasion.models.adapters import add_lora
from suasion.models.load import switch_off_dropout
from suasion.models.scope import AdapterScope
from suasion.models.shared import CRITIC, POLICY, REWARD, copy_adapter
from tests.unit.conftest import tiny_model

IDS = torch.tensor([[5, 9, 12, 7, 30]])


def shared(family: str = "llama", *, checkpointing: bool = False) -> tuple[Any, AdapterScope]:
    """A tiny base with three different adapters; the policy's is at rest."""
    model = add_lora(tiny_model(family), LoraConfig(r=2), dropout=False)
    for name in (CRITIC, REWARD):
        copy_adapter(model, POLICY, name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.3)
    switch_off_dropout(model)
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    model.train(checkpointing)  # the library checkpoints in training mode alone
    scope = AdapterScope(model, POLICY)
    scope.add(CRITIC, learns=True)
    scope.add(REWARD, learns=False)
    return model, scope


def loss_of(model: Any) -> Tensor:
    """Of one forward pass through the trunk."""
    trunk = model.get_base_model().base_model
    hidden: Tensor = trunk(input_ids=IDS, use_cache=False).last_hidden_state
    return (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum()


def gradients(scope: AdapterScope, name: str) -> dict[str, Tensor]:
    """Of one adapter's weights, zeros where there is none."""
    named = scope.parameters(name)
    return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in named}


def right_gradients(name: str) -> dict[str, Tensor]:
    """What one forward and backward pass of an adapter gives."""
    model, scope = shared()
    with scope.use(name):
        loss_of(model).backward()
    return gradients(scope, name)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether gradients agree."""
    return all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-5) for k in one)


@pytest.fixture
def unguarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches every refusal off."""
    return lambda: monkeypatch.setattr(scopes, "_refuse", lambda *_: None)


def test_each_adapter_is_a_function_of_its_own() -> None:
    """And at rest, and after every block, the policy's is active."""
    model, scope = shared()
    with torch.no_grad():
        resting = loss_of(model)
        found = {}
        for name in (POLICY, CRITIC, REWARD, None):
            with scope.use(name):
                assert scope.active == name
                found[name] = float(loss_of(model))
            assert scope.active == POLICY
            assert torch.equal(loss_of(model), resting)
        assert found[POLICY] == float(resting)
        assert len(set(found.values())) == 4
    assert not any(p.requires_grad for _, p in scope.parameters(REWARD))


def test_requires_grad_does_not_follow_the_switch() -> None:
    """What learns learns, active or not; optimizers are made from names."""
    model, scope = shared()
    learns = {id(p) for name in (POLICY, CRITIC) for _, p in scope.parameters(name)}
    for name in (None, CRITIC, REWARD, POLICY):
        with scope.use(name):
            assert {id(p) for p in model.parameters() if p.requires_grad} == learns
    assert len(learns) == len(scope.parameters(POLICY)) + len(scope.parameters(CRITIC))


def test_an_unknown_adapter_is_named() -> None:
    """With those that there are."""
    model, scope = shared()
    with pytest.raises(ModelError, match="no adapter 'critc', only default, critic, reward"):
        scope.use("critc").__enter__()
    with pytest.raises(ModelError, match="no adapter 'judge'"):
        scope.add("judge", learns=True)
    assert model.active_adapters == [POLICY]


def test_turns_one_after_the_other() -> None:
    """Forward and backward in one block each: both gradients are right."""
    model, scope = shared()
    loss_of(model).backward()
    with scope.use(CRITIC):
        loss_of(model).backward()
    for name in (POLICY, CRITIC):
        assert close(gradients(scope, name), right_gradients(name))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_others_may_look_between_forward_and_backward(checkpointing: bool) -> None:  # noqa: FBT001
    """Without gradient, they leave no trace."""
    model, scope = shared(checkpointing=checkpointing)
    loss = loss_of(model)
    with torch.no_grad():
        for name in (None, REWARD, CRITIC):
            with scope.use(name):
                loss_of(model)
    loss.backward()
    assert close(gradients(scope, POLICY), right_gradients(POLICY))


class TestZeroGradients:
    """Switched between forward and backward, the adapter that was used learns nothing."""

    def test_switching_is_refused(self) -> None:
        """By name, before anything is computed; the policy goes on as if nothing had been."""
        model, scope = shared()
        loss = loss_of(model)
        with (
            pytest.raises(
                TrainingError, match="the adapter 'critic' while a graph of the adapter 'default'"
            ),
            scope.use(CRITIC),
        ):
            pytest.fail("the block was entered")
        loss.backward()
        assert close(gradients(scope, POLICY), right_gradients(POLICY))

    def test_leaving_with_an_open_graph_is_refused(self) -> None:
        """Its backward pass would run under another adapter."""
        model, scope = shared()
        back = "going back to the adapter 'default'"
        with pytest.raises(TrainingError, match=back), scope.use(CRITIC):
            loss = loss_of(model)
        assert scope.active == POLICY
        with pytest.raises(TrainingError, match="a backward pass of the adapter 'critic' while"):
            loss.backward()

    def test_a_forward_with_gradient_inside_no_grad_is_refused(self) -> None:
        """A block entered without gradient does not open the door for them."""
        model, scope = shared()
        loss = loss_of(model)
        refused = pytest.raises(TrainingError, match="recording gradients of the adapter 'critic'")
        with torch.no_grad(), scope.use(CRITIC), torch.enable_grad(), refused:
            loss_of(model)
        loss.backward()

    def test_peft_switched_behind_the_back(self, unguarded: Callable[[], None]) -> None:
        """Its own switch freezes the adapter that leaves: refused here, silent without."""
        model, scope = shared()
        loss = loss_of(model)
        model.set_adapter(CRITIC)
        with pytest.raises(TrainingError, match="'default' while the adapter 'critic' is active"):
            loss.backward()
        with pytest.raises(TrainingError, match="a forward pass of the adapter 'default' while"):
            loss_of(model)

        unguarded()
        model, scope = shared()
        total = loss_of(model)
        model.set_adapter(CRITIC)
        (total + loss_of(model)).backward()
        lost = gradients(scope, POLICY)
        assert not any(gradient.any() for gradient in lost.values())
        assert not close(lost, right_gradients(POLICY))

    def test_backward_with_adapters_off(self, unguarded: Callable[[], None]) -> None:
        """The same, where the reference's block is left too late."""
        model, scope = shared()
        loss = loss_of(model)
        refused = pytest.raises(TrainingError, match="'default' while the base alone is active")
        with model.disable_adapter(), refused:
            loss.backward()

        unguarded()
        model, scope = shared()
        loss = loss_of(model)
        with model.disable_adapter():
            loss.backward()
        assert not any(gradient.any() for gradient in gradients(scope, POLICY).values())

    def test_a_graph_that_nobody_holds_is_closed(self) -> None:
        """No backward pass will come of it."""
        model, scope = shared()
        loss_of(model)
        with scope.use(CRITIC):
            loss_of(model).backward()
        assert close(gradients(scope, CRITIC), right_gradients(CRITIC))


class TestWrongGradients:
    """With gradient checkpointing the backward pass recomputes under whatever is active then."""

    def test_a_joint_loss(self, unguarded: Callable[[], None]) -> None:
        """Two adapters in one backward pass: refused here, wrong without a word otherwise."""
        model, scope = shared(checkpointing=True)
        first = loss_of(model)
        with pytest.raises(TrainingError, match="while a graph of the adapter 'default' is open"):
            scope.use(CRITIC).__enter__()
        first.backward()
        assert close(gradients(scope, POLICY), right_gradients(POLICY))

        unguarded()
        model, scope = shared(checkpointing=True)
        first = loss_of(model)
        with scope.use(CRITIC):
            (first + loss_of(model)).backward()
        wrong = gradients(scope, POLICY)
        assert not close(wrong, right_gradients(POLICY))

    def test_a_second_backward_pass_elsewhere(self) -> None:
        """A graph that was kept is looked at each time it is used."""
        model, scope = shared(checkpointing=True)
        loss = loss_of(model)
        loss.backward(retain_graph=True)
        refused = pytest.raises(TrainingError, match="a backward pass of the adapter 'default'")
        with scope.use(CRITIC), refused:
            loss.backward()
