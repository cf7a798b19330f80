"""Policy, reference and critic: what each computes, on whose weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from suasion.config.schema import LoraConfig
from suasion.core.errors import ModelError
from suasion.core.records import TokenBatch, token_batch
from suasion.models.adapters import add_lora
from suasion.models.load import switch_off_dropout
from suasion.models.references import AdapterOffReference, FrozenReference
from suasion.models.roles import (
    ModelCritic,
    Policy,
    TrunkCritic,
    hidden_size_of,
)
from tests.unit.conftest import FAMILIES, tiny_config, tiny_model

Policies = Callable[[str], Policy]
QUERIES = [[5, 9, 12], [7], [30, 31, 32, 33, 34]]
RESPONSES = [[20, 21], [22, 23, 24, 25], [26]]


@pytest.fixture
def batch() -> TokenBatch:
    """Three rows of different lengths."""
    return token_batch(QUERIES, RESPONSES, 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_entropies_are_those_of_the_full_logits(
    policies: Policies, batch: TokenBatch, family: str
) -> None:
    """Only response positions reach the vocabulary; each row as if it were alone."""
    policy = Policy(policies(family).model, 0.7)
    found, entropy, hidden = policy.logprobs(batch, with_entropy=True)
    assert entropy is not None
    expected, entropies = [], []
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        ids = torch.tensor([[*query, *response]])
        logits = policy.model(input_ids=ids).logits[0, len(query) - 1 : -1].double() / 0.7
        logprobs = logits.log_softmax(-1)
        expected.append(logprobs[torch.arange(len(response)), torch.tensor(response)])
        entropies.append(-(logprobs.exp() * logprobs).sum(-1))
    torch.testing.assert_close(found.double(), torch.cat(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy.double(), torch.cat(entropies), atol=1e-4, rtol=0)
    assert hidden.shape == (7, hidden_size_of(policy))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_adapters_off_is_the_base(batch: TokenBatch, family: str) -> None:
    """Before and after the adapter has learnt something; and it is on again afterwards."""
    base = Policy(tiny_model(family), 1.0)
    policy = Policy(add_lora(tiny_model(family), LoraConfig(r=4), dropout=False).eval(), 1.0)
    expected = base.logprobs(batch)[0].detach()
    reference = AdapterOffReference(policy)
    assert torch.equal(reference.logprobs(batch), expected)
    assert torch.equal(policy.logprobs(batch)[0].detach(), expected)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            assert "lora_" in name
            parameter.normal_(std=0.3)
    assert torch.equal(reference.logprobs(batch), expected)
    assert (policy.logprobs(batch)[0] - expected).abs().max() > 0.01


def test_adapters_off_needs_adapters(policies: Policies) -> None:
    """There is nothing to switch off otherwise."""
    with pytest.raises(ModelError, match="needs a policy with adapters"):
        AdapterOffReference(policies("gpt2"))


def test_a_frozen_reference_stays(batch: TokenBatch) -> None:
    """While the policy moves on."""
    policy = Policy(tiny_model("gpt2"), 1.0)
    reference = FrozenReference.copy_of(policy)
    before = policy.logprobs(batch)[0].detach()
    with torch.no_grad():
        policy.head.weight.mul_(1.5)
    assert torch.equal(reference.logprobs(batch), before)
    assert not torch.allclose(policy.logprobs(batch)[0], before)
    assert not reference.logprobs(batch).requires_grad


def test_a_new_critic_says_nothing() -> None:
    """Its first values are zero, whatever it reads."""
    assert not TrunkCritic(8).of(torch.randn(3, 8)).any()


def test_values_come_from_where_the_next_token_is_predicted(batch: TokenBatch) -> None:
    """For a critic of its own: the library's score at the position before each response token."""
    torch.manual_seed(0)
    config = tiny_config("llama")
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config).eval()
    values = ModelCritic(model).values(batch, torch.empty(0))
    expected = []
    for query, response in zip(QUERIES, RESPONSES, strict=True):
        for end in range(len(query), len(query) + len(response)):
            ids = torch.tensor([[*query, *response][:end]])
            expected.append(model(input_ids=ids).logits[0, 0])
    torch.testing.assert_close(values, torch.stack(expected), atol=1e-5, rtol=0)


def test_a_model_in_training_is_left_in_training() -> None:
    """The proof of the head switches dropout off for a moment only."""
    model = add_lora(tiny_model("gpt2"), LoraConfig(r=4, dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    model.train()
    assert Policy(model, 1.0).model.training


def test_logits_changed_after_the_head_are_refused() -> None:
    """Log-probabilities from the head alone would be wrong."""
    model = tiny_model("gpt2")
    plain = model.forward

    def capped(*arguments: object, **named: object) -> object:
        out = plain(*arguments, **named)
        out.logits = 2 * torch.tanh(out.logits)
        return out

    model.forward = capped
    with pytest.raises(ModelError, match="changes its logits after the output head"):
        Policy(model, 1.0)


def test_an_adapter_on_the_output_head_is_refused() -> None:
    """It begins as zero, so that no comparison at the start would see it left out."""
    adapted = add_lora(tiny_model("llama"), LoraConfig(r=2, targets=("q_proj", "lm_head")), seed=1)
    with pytest.raises(ModelError, match="output head has an adapter"):
        Policy(adapted, 1.0)


def test_weights_that_are_no_numbers_are_named() -> None:
    """And not taken for a family that is not supported."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="logits that are not numbers"):
        Policy(model, 1.0)


def test_no_dropout_is_left() -> None:
    """Two passes in training mode agree."""
    config = tiny_config("gpt2")
    assert config.resid_pdrop > 0
    model = type(tiny_model("gpt2"))(config).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert not torch.equal(model(ids).logits, model(ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
