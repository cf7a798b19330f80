"""The sampler against the library's own generation, against a fresh forward, and against chance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM

from suasion.config.schema import LoraConfig
from suasion.core.errors import TrainingError
from suasion.core.records import token_batch
from suasion.core.seeding import generator
from suasion.models.adapters import add_lora
from suasion.models.roles import Policy
from suasion.rollout import decoders
from suasion.rollout.library import generate
from suasion.rollout.sampler import Sampling, draw, sample
from suasion.rollout.weights import decoding_weights
from tests.unit.conftest import FAMILIES, VOCABULARY, tiny_config, tiny_model

Policies = Callable[[str], Policy]

QUERIES = [[5, 9, 12, 200], [7], [33, 44, 55, 66, 77, 88, 99], [8, 8, 8], [150, 160]]
NEVER = VOCABULARY - 1
"""A stop token that these models hardly draw."""


def uniforms(count: int, length: int = 32, seed: int = 1) -> list[Tensor]:
    """A stream of uniform numbers for each row."""
    return [
        torch.rand(length, generator=generator(seed, "row", row), dtype=torch.float64)
        for row in range(count)
    ]


def fresh_logprobs(policy: Policy, query: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities by the library's own forward, one row alone."""
    ids = torch.tensor([[*query, *response]])
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0, len(query) - 1 : -1].float()
    every = (logits / policy.temperature).log_softmax(-1)
    return every[torch.arange(len(response)), torch.tensor(list(response))]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_librarys_greedy(policies: Policies, family: str) -> None:
    """Row by row without padding there, left-padded in one batch here."""
    policy = policies(family)
    stops = (1,)
    found = sample(
        policy,
        QUERIES,
        [12] * len(QUERIES),
        uniforms(len(QUERIES)),
        stop_ids=stops,
        pad_id=0,
        sampling=Sampling(greedy=True),
    )
    for query, response in zip(QUERIES, found.responses, strict=True):
        theirs = policy.model.generate(
            torch.tensor([query]),
            attention_mask=torch.ones(1, len(query), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert response == theirs[0, len(query) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_a_fresh_forward(policies: Policies, family: str) -> None:
    """In spite of cache, padding and rows that left the batch."""
    policy = policies(family)
    limits = [3, 14, 6, 1, 10]
    found = sample(policy, QUERIES, limits, uniforms(5), stop_ids=(NEVER,), pad_id=0)
    for query, response, logprobs in zip(
        found.queries, found.responses, found.logprobs, strict=True
    ):
        expected = fresh_logprobs(policy, query, response)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


def test_the_update_sees_the_same_logprobs(policies: Policies) -> None:
    """Right-padded, through the trunk and the head apart."""
    policy = policies("gpt2")
    found = sample(policy, QUERIES, [8] * 5, uniforms(5), stop_ids=(NEVER,), pad_id=0)
    again = policy.logprobs(token_batch(found.queries, found.responses, 0))[0]
    torch.testing.assert_close(again.detach(), torch.cat(found.logprobs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_response_does_not_depend_on_its_neighbours(policies: Policies, family: str) -> None:
    """Alone, in another order, with others: the same tokens for the same numbers."""
    policy, numbers = policies(family), uniforms(5)
    together = sample(policy, QUERIES, [10] * 5, numbers, stop_ids=(3, 4), pad_id=0).responses
    order = [3, 0, 4, 2, 1]
    shuffled = sample(
        policy,
        [QUERIES[i] for i in order],
        [10] * 5,
        [numbers[i] for i in order],
        stop_ids=(3, 4),
        pad_id=0,
    ).responses
    for row, query in enumerate(QUERIES):
        alone = sample(policy, [query], [10], [numbers[row]], stop_ids=(3, 4), pad_id=0)
        assert alone.responses[0] == together[row] == shuffled[order.index(row)]


def test_limits_and_stops(policies: Policies) -> None:
    """A row ends at its limit, unfinished, or with its stop token, finished; never in between."""
    policy = policies("gpt2")
    stops = tuple(range(0, VOCABULARY, 5))
    limits = [1, 3, 9, 20] * 8
    queries = [[10 + row] for row in range(32)]
    found = sample(policy, queries, limits, uniforms(32), stop_ids=stops, pad_id=0)
    assert len(set(found.finished)) == 2
    for response, limit, finished in zip(found.responses, limits, found.finished, strict=True):
        assert finished == (response[-1] in stops)
        assert not set(response[:-1]) & set(stops)
        assert finished or len(response) == limit
        assert 1 <= len(response) <= limit


def test_padding_may_be_the_stop_token(policies: Policies) -> None:
    """Lengths are counted, not read off padding."""
    policy = policies("gpt2")
    one = sample(policy, QUERIES, [9] * 5, uniforms(5), stop_ids=(7,), pad_id=7)
    two = sample(policy, QUERIES, [9] * 5, uniforms(5), stop_ids=(7,), pad_id=0)
    assert one.responses == two.responses
    assert one.finished == two.finished


def test_temperature_is_in_the_logprobs(policies: Policies) -> None:
    """Both the draw and what is reported of it."""
    policy = Policy(policies("llama").model, 0.5)
    found = sample(policy, QUERIES, [6] * 5, uniforms(5), stop_ids=(NEVER,), pad_id=0)
    expected = fresh_logprobs(policy, found.queries[2], found.responses[2])
    torch.testing.assert_close(found.logprobs[2], expected, atol=1e-5, rtol=0)


def test_values_are_of_the_position_before_each_token(policies: Policies) -> None:
    """As the update computes them from whole sequences."""
    policy = policies("gpt2")
    weights = torch.linspace(-1, 1, 32)
    found = sample(
        policy, QUERIES, [7] * 5, uniforms(5), stop_ids=(3,), pad_id=0, value=lambda h: h @ weights
    )
    assert found.values is not None
    hidden = policy.logprobs(token_batch(found.queries, found.responses, 0))[2]
    torch.testing.assert_close(
        torch.cat(found.values), (hidden @ weights).detach(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=5), Sampling(top_p=0.6), Sampling(top_k=20, top_p=0.5)]
)
def test_frequencies_follow_the_distribution(policies: Policies, sampling: Sampling) -> None:
    """First tokens of many rows, by chi-square against the filtered softmax."""
    policy, rows = policies("llama"), 4000
    draws = torch.rand(rows, 1, generator=generator(5, "chi"), dtype=torch.float64)
    found = sample(
        policy,
        [[5, 9, 12]] * rows,
        [1] * rows,
        list(draws),
        stop_ids=(NEVER,),
        pad_id=0,
        sampling=sampling,
    )
    ids = torch.tensor([[5, 9, 12]])
    with torch.no_grad():
        probs = policy.model(input_ids=ids).logits[0, -1].double().softmax(-1)
    expected = filtered(probs, sampling)
    drawn = torch.bincount(torch.tensor([r[0] for r in found.responses]), minlength=VOCABULARY)
    assert not drawn[expected == 0].any()
    common = expected * rows >= 5
    observed = torch.cat([drawn[common].double(), drawn[~common].sum()[None].double()])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * rows
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > 1e-3
    if sampling == Sampling():  # negative control: a slightly other distribution is noticed
        other = probs.pow(1.3) / probs.pow(1.3).sum() * rows
        other = torch.cat([other[common], other[~common].sum()[None]])
        assert chisquare(observed, other).pvalue < 1e-6


def filtered(probs: Tensor, sampling: Sampling) -> Tensor:
    """Top-k, then top-p of what is left, token by token."""
    kept = dict.fromkeys(range(len(probs)), 0.0)
    ranked = sorted(kept, key=lambda i: -float(probs[i]))[: sampling.top_k or None]
    mass, total = 0.0, sum(float(probs[i]) for i in ranked)
    for token in ranked:
        if mass / total >= sampling.top_p:
            break
        kept[token] = float(probs[token])
        mass += kept[token]
    found = torch.tensor(list(kept.values()), dtype=torch.float64)
    return found / found.sum()


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_extreme_numbers_draw_possible_tokens(policies: Policies, uniform: float) -> None:
    """Neither a token of probability zero nor one beyond the vocabulary."""
    row = [torch.full((4,), uniform, dtype=torch.float64)]
    found = sample(
        policies("gpt2"),
        [[5]],
        [4],
        row,
        stop_ids=(NEVER,),
        pad_id=0,
        sampling=Sampling(top_k=3),
    )
    assert all(logprob > -8 for logprob in found.logprobs[0])


def test_only_the_plain_draw_leaves_the_distribution_alone() -> None:
    """The KL estimate is unbiased under no other."""
    assert not Sampling().alters_distribution
    assert Sampling(top_k=3).alters_distribution
    assert Sampling(top_p=0.9).alters_distribution
    assert Sampling(greedy=True).alters_distribution


@pytest.mark.parametrize("family", FAMILIES)
def test_slots_change_nothing(policies: Policies, family: str) -> None:
    """Prompts that wait for a place get the responses they would have got at once."""
    policy, numbers = policies(family), uniforms(5)
    limits = [3, 14, 6, 1, 10]
    found = [
        sample(policy, QUERIES, limits, numbers, stop_ids=(3, 4), pad_id=0, slots=slots)
        for slots in (256, 3, 1)
    ]
    assert found[0].responses == found[1].responses == found[2].responses
    for other in found[1:]:
        for one, two in zip(found[0].logprobs, other.logprobs, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_equal_prompts_are_run_once(policies: Policies, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several responses to one prompt share its first pass, and are as if they did not."""
    policy = policies("llama")
    seen: list[int] = []
    real = decoders.run_packed

    def watched(trunk: Any, ids: Tensor, *rest: Any) -> Tensor:
        seen.append(len(ids))
        return real(trunk, ids, *rest)

    monkeypatch.setattr(decoders, "run_packed", watched)
    queries = [QUERIES[0], QUERIES[2], QUERIES[0], QUERIES[0]]
    found = sample(policy, queries, [9] * 4, uniforms(4), stop_ids=(NEVER,), pad_id=0)
    assert seen == [len(QUERIES[0]) + len(QUERIES[2])]
    assert len({tuple(found.responses[row]) for row in (0, 2, 3)}) == 3
    for query, response, logprobs in zip(queries, found.responses, found.logprobs, strict=True):
        expected = fresh_logprobs(policy, query, response)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_gives_the_same(policies: Policies, family: str) -> None:
    """Greedily, behind the same interface: tokens, ends and log-probabilities."""
    policy, limits = policies(family), [3, 14, 6, 1, 10]
    ours = sample(
        policy,
        QUERIES,
        limits,
        uniforms(5),
        stop_ids=(1,),
        pad_id=0,
        sampling=Sampling(greedy=True, min_tokens=2),
    )
    theirs = generate(
        policy,
        QUERIES,
        limits,
        stop_ids=(1,),
        pad_id=0,
        sampling=Sampling(greedy=True, min_tokens=2),
    )
    assert ours.responses == theirs.responses
    assert ours.reasons == theirs.reasons
    assert ours.altered
    for one, two in zip(ours.logprobs, theirs.logprobs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_no_stop_before_its_time(policies: Policies) -> None:
    """Half of the vocabulary ends a response, but not before its fourth token."""
    policy, stops = policies("gpt2"), tuple(range(0, VOCABULARY, 2))
    found = sample(
        policy,
        [[10 + row] for row in range(32)],
        [8] * 32,
        uniforms(32),
        stop_ids=stops,
        pad_id=0,
        sampling=Sampling(min_tokens=3),
    )
    lengths = [len(response) for response in found.responses]
    assert min(lengths) == 4
    assert found.altered
    plain = sample(policy, [[10]], [8], uniforms(1), stop_ids=stops, pad_id=0)
    assert not plain.altered


def test_stop_strings(policies: Policies) -> None:
    """A response ends with the token that completes one, and is finished."""
    policy = policies("llama")

    def text_of(ids: list[int]) -> str:
        return "".join("<end>"[token % 5] for token in ids)

    found = sample(
        policy,
        [[10 + row] for row in range(64)],
        [30] * 64,
        uniforms(64),
        stop_ids=(NEVER,),
        pad_id=0,
        sampling=Sampling(stop_strings=("en", "d>")),
        text_of=text_of,
    )
    assert {"stop string", "length"} <= set(found.reasons)
    for response, reason, finished in zip(
        found.responses, found.reasons, found.finished, strict=True
    ):
        text = text_of(response)
        assert finished == (reason != "length")
        assert reason == "stop" or (reason == "stop string") == text.endswith(("en", "d>"))
        assert "en" not in text[:-1]
        assert "d>" not in text[:-1]
    assert not found.altered


def test_decoding_weights_are_given_back(policies: Policies) -> None:
    """Rollouts run on copies in another form; the model's own weights are not touched."""
    policy = policies("gpt2")
    layer = policy.trunk.h[0].attn.c_attn
    x = torch.randn(3, 1, layer.weight.shape[0], generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with decoding_weights(policy):
            assert policy.decoding_head is not None
            assert "forward" in vars(layer)
            inside = layer(x), policy.logits(x)
        found = sample(policy, QUERIES, [9] * 5, uniforms(5), stop_ids=(NEVER,), pad_id=0)
        again = policy.logprobs(token_batch(found.queries, found.responses, 0))[0]
        outside = layer(x), policy.logits(x)
    assert policy.decoding_head is None
    assert "forward" not in vars(layer)
    for one, two in zip(inside, outside, strict=True):
        assert one.dtype is two.dtype
        torch.testing.assert_close(one.float(), two.float(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(again.detach(), torch.cat(found.logprobs), atol=0.05, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_decode_as_they_compute(family: str) -> None:
    """One product with three weights stands for peft's layer; in other states, the layer itself."""
    adapted = add_lora(tiny_model(family), LoraConfig(r=4), seed=1, dropout=False)
    rng = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=rng)
    policy = Policy(adapted, 1.0)
    layers = [module for module in policy.trunk.modules() if isinstance(module, LoraLayer)]
    inputs = [torch.randn(3, 1, layer.in_features, generator=rng) for layer in layers]

    def outputs() -> list[Tensor]:
        return [layer(x).float() for layer, x in zip(layers, inputs, strict=True)]

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        outside = outputs()
        with decoding_weights(policy):
            assert all("forward" in vars(layer) for layer in layers)
            assert all("forward" not in vars(layer.get_base_layer()) for layer in layers)
            inside = outputs()
        with adapted.disable_adapter():
            bare = outputs()
            with decoding_weights(policy):
                assert not any("forward" in vars(layer) for layer in layers)
                bare_inside = outputs()
    for one, two in zip(inside + bare_inside, outside + bare, strict=True):
        torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(outside, bare, strict=True))


@pytest.mark.parametrize(
    "special",
    [{"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_other_kinds_of_adapters_decode_as_they_compute(special: dict[str, Any]) -> None:
    """What is more than two products added to the layer's own is left to peft."""
    adapted: Any = get_peft_model(
        tiny_model("opt"), peft.LoraConfig(r=4, target_modules="all-linear", **special)
    )
    rng = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=rng)
    policy = Policy(adapted, 1.0)
    ids = torch.tensor([[5, 9, 12, 200]])
    mask = torch.ones_like(ids, dtype=torch.bool)

    def logits() -> Tensor:
        torch.manual_seed(3)  # of the adapter's dropout, where that is on
        return policy.logits(policy(ids, mask).last_hidden_state)

    for train in (False, True):
        adapted.train(train)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outside = logits()
            with decoding_weights(policy):
                inside = logits()
        torch.testing.assert_close(inside, outside, atol=0.05, rtol=0.02)


def test_prompts_as_long_as_the_context_are_sampled_in_bf16() -> None:
    """Rows are filled up to the next step by sequences that the model has positions for."""
    config = tiny_config("gpt2")
    config.n_positions = 12
    policy = Policy(AutoModelForCausalLM.from_config(config).eval(), 1.0)
    queries = [[5 + row, 6, 7, 8, 9, 10, 11] for row in range(12)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sample(policy, queries, [5] * 12, uniforms(12), stop_ids=(NEVER,), pad_id=0)
        with torch.no_grad():
            again = policy.logprobs(token_batch(queries, found.responses, 0))[0]
    torch.testing.assert_close(torch.cat(found.logprobs), again, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("probs", [[[0.5, 0.5], [torch.nan, 0.5]], [[0.0, 0.0], [0.5, 0.5]]])
def test_a_policy_that_says_nothing_is_named(probs: list[list[float]]) -> None:
    """Rather than an index that does not exist."""
    with pytest.raises(TrainingError, match="gives no token a chance"):
        draw(torch.tensor(probs), torch.tensor([0.1, 0.9]).double(), Sampling())


def test_drawing_by_blocks_inverts_the_distribution() -> None:
    """Uniform numbers on a grid give the tokens that one long sum in float64 gives."""
    rng = torch.Generator().manual_seed(5)
    probs = (3 * torch.randn(1, 1000, generator=rng)).softmax(-1)
    probs[:, 100:300] = 0.0  # a block of nothing, and parts of two
    probs[:, -1] = 1e-9
    count = 20_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    edge = torch.nextafter(torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    uniform = torch.cat([torch.zeros(1, dtype=torch.float64), grid, edge])
    found = draw(probs.expand(len(uniform), -1), uniform, Sampling())
    cumulative = probs[0].double().cumsum(0)
    expected = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True)
    assert torch.equal(found, expected.clamp(max=999))
    assert bool((probs[0, found] > 0).all())
    assert int(found[-1]) == 999, "the last token, however rare"
