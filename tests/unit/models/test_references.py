"""What the policy is held to: copies that share, snapshots, and telling them apart."""

from __future__ import annotations

import pytest
import torch

from suasion.config.schema import LoraConfig
from suasion.core.records import token_batch
from suasion.models.adapters import add_lora
from suasion.models.references import (
    AdapterReference,
    FrozenReference,
    fingerprint,
    front_parameters,
)
from suasion.models.roles import Policy
from suasion.models.scope import AdapterScope
from suasion.models.shared import POLICY, REFERENCE, copy_adapter
from tests.unit.conftest import FAMILIES, tiny_model

BATCH = token_batch([[5, 9, 12], [7]], [[20, 21], [22, 23, 24]], 0)


def adapted(seed: int = 1) -> Policy:
    """A policy whose adapter has learnt something, with a snapshot of it."""
    model = add_lora(tiny_model("llama"), LoraConfig(r=2), dropout=False).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    copy_adapter(model, POLICY, REFERENCE)
    scope = AdapterScope(model, POLICY)
    scope.add(REFERENCE, learns=False)
    return Policy(model, 1.0, scope)


def test_a_snapshot_stays_while_the_policy_moves() -> None:
    """At first it is the policy; it is never the raw base."""
    policy = adapted()
    assert policy.scope is not None
    snapshot = AdapterReference(policy, policy.scope, REFERENCE)
    raw = AdapterReference(policy, policy.scope)
    before = policy.logprobs(BATCH)[0].detach()
    assert torch.equal(snapshot.logprobs(BATCH), before)
    assert not torch.allclose(raw.logprobs(BATCH), before, atol=1e-2)
    with torch.no_grad():
        for _, weight in policy.trainable():
            weight.mul_(2.0)
    assert torch.equal(snapshot.logprobs(BATCH), before)
    assert not torch.equal(policy.logprobs(BATCH)[0], before)
    assert not snapshot.logprobs(BATCH).requires_grad


def test_only_the_policy_s_own_weights_are_its_own() -> None:
    """Not those of the other adapters on its base."""
    policy = adapted()
    names = [name for name, _ in policy.trainable()]
    assert names
    assert all(f".{POLICY}." in name for name in names)
    assert len(list(policy.module.parameters())) == len(names)


def test_references_are_told_apart() -> None:
    """By base, by snapshot, and by whether there is one; not by how far the policy went."""
    one, other = adapted(1), adapted(2)
    assert one.scope is not None
    assert other.scope is not None
    identities = {
        AdapterReference(one, one.scope).identity(),
        AdapterReference(one, one.scope, REFERENCE).identity(),
        AdapterReference(other, other.scope, REFERENCE).identity(),
        FrozenReference(tiny_model("llama", seed=1), 1.0).identity(),
    }
    assert len(identities) == 4
    raw = AdapterReference(one, one.scope)
    assert raw.identity() == AdapterReference(other, other.scope).identity()
    before = raw.identity()
    with torch.no_grad():
        for _, weight in one.trainable():
            weight.add_(1.0)
    assert raw.identity() == before


def test_rounded_it_is_the_same_reference() -> None:
    """A run that began in fp32 goes on in bf16, and the other way round."""
    reference = FrozenReference(tiny_model("llama"), 1.0)
    before = reference.identity()
    reference.hold_rounded(torch.bfloat16)
    assert any(p.dtype is torch.bfloat16 for p in reference.model.parameters())
    assert reference.identity() == before
    assert fingerprint(reference.model.named_parameters()) != before


def test_a_fingerprint_sees_a_training_step() -> None:
    """Of any size; and types and shapes."""
    one = torch.arange(100_000.0)
    assert fingerprint([("a", one)]) == fingerprint([("a", one.clone())])
    for changed in (one + 1e-2, one.double(), one.reshape(10, -1), one[1:]):
        assert fingerprint([("a", changed)]) != fingerprint([("a", one)])
    assert fingerprint([("b", one)]) != fingerprint([("a", one)])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_layer_is_shared_in_every_family(family: str) -> None:
    """The copy and the model hold the same tensors in front, and neither trains them."""
    policy = Policy(tiny_model(family), 1.0)
    front = front_parameters(policy.model, 1)
    assert front is not None
    reference = FrozenReference.copy_of(policy, shared=front)
    theirs = {each.data_ptr() for each in reference.model.parameters()}
    shared = [each for each in policy.model.parameters() if each.data_ptr() in theirs]
    assert {id(each) for each in shared} == {id(each) for each in front}
    assert not any(each.requires_grad for each in front)
    before = policy.logprobs(BATCH)[0].detach()
    with torch.no_grad():
        for _, weight in policy.trainable():
            weight.mul_(1.5)
    assert torch.equal(reference.logprobs(BATCH), before)
    assert not torch.equal(policy.logprobs(BATCH)[0], before)


def test_there_is_no_layer_after_the_last() -> None:
    """Sharing all of them would leave nothing to train."""
    assert front_parameters(tiny_model("llama"), 2) is None
