"""Log-probabilities and entropies, whole and in chunks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from suasion.functional import logprobs as module
from suasion.functional.kl import full_kl
from suasion.functional.logprobs import entropy_from_logits, linear_logprobs, token_logprobs

N, D, V = 7, 3, 5


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and tokens of a small head."""
    rng = torch.Generator().manual_seed(3)
    make = [
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in ((N, D), (V, D), (V,))
    ]
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in make)
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=rng)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_chunks_equal_the_whole(chunk: int, temperature: float) -> None:
    """Values and gradients, with uneven chunks and a mixed upstream gradient."""
    hidden, weight, bias, tokens = head()
    logits = hidden @ weight.T + bias
    wanted = token_logprobs(logits, tokens, temperature), entropy_from_logits(logits, temperature)
    got = linear_logprobs(hidden, weight, bias, tokens, temperature, chunk=chunk, with_entropy=True)
    up = torch.linspace(-1.5, 2.0, N, dtype=torch.float64)
    gradients = []
    for logprobs, entropy in (wanted, got):
        assert entropy is not None
        total = (up * logprobs).sum() + (up.flip(0).square() * entropy).sum()
        gradients.append(torch.autograd.grad(total, (hidden, weight, bias)))
    for a, b in zip([*wanted, *gradients[0]], [*got, *gradients[1]], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gradcheck(with_entropy: bool, with_bias: bool) -> None:  # noqa: FBT001  parameters
    """Against finite differences, with and without the optional parts."""
    hidden, weight, bias, tokens = head()

    def run(h: Tensor, w: Tensor, *b: Tensor) -> Any:
        out = linear_logprobs(
            h, w, b[0] if b else None, tokens, 0.8, chunk=3, with_entropy=with_entropy
        )
        return out if with_entropy else out[0]

    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_used_alone(output: int) -> None:
    """A loss on the log-probabilities only, or on the entropy only."""
    hidden, weight, bias, tokens = head()
    logits = hidden @ weight.T + bias
    wanted = (token_logprobs(logits, tokens), entropy_from_logits(logits))[output]
    got = linear_logprobs(hidden, weight, bias, tokens, chunk=2, with_entropy=True)[output]
    assert got is not None
    for a, b in zip(
        torch.autograd.grad(wanted.sum(), (hidden, weight, bias)),
        torch.autograd.grad(got.sum(), (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_frozen_parts_get_no_gradient() -> None:
    """A frozen head (adapters) costs no weight gradient, a frozen trunk no hidden one."""
    hidden, weight, bias, tokens = head()
    for frozen in ({0}, {1, 2}, {1}, {2}):
        parts = [
            x.detach().requires_grad_(i not in frozen) for i, x in enumerate((hidden, weight, bias))
        ]
        logprobs, entropy = linear_logprobs(parts[0], parts[1], parts[2], tokens)
        assert entropy is None
        logprobs.sum().backward()
        assert [x.grad is None for x in parts] == [i in frozen for i in range(3)]


class Products(TorchDispatchMode):
    """Rows of every matrix product over the vocabulary, and the largest tensor there was.

    Args:
        vocabulary: Columns of the products that count.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.rows: list[int] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
            product = func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
            if product and out.shape[1] == self.vocabulary:
                self.rows.append(len(out))
        return out


def test_logits_of_all_positions_never_exist() -> None:
    """No product is ever as long as the positions are many, and no tensor as large."""
    hidden, weight, bias, tokens = head()
    for keep, expected in ((False, [3, 3, 1, 3, 3, 1]), (True, [3, 3, 1])):
        with Products(V) as seen:
            logprobs, _ = linear_logprobs(hidden, weight, bias, tokens, chunk=3, keep=keep)
            logprobs.sum().backward()
        assert seen.rows == expected, "forward, then recomputed unless kept"
        assert seen.largest < N * V


@pytest.mark.parametrize("with_entropy", [False, True])
def test_kept_logits_give_the_same_gradients(*, with_entropy: bool) -> None:
    """Whether logits are kept or computed again changes no bit."""
    found = []
    for keep in (False, True):
        hidden, weight, bias, tokens = head()
        logprobs, entropy = linear_logprobs(
            hidden, weight, bias, tokens, 0.7, chunk=3, with_entropy=with_entropy, keep=keep
        )
        loss = (logprobs * torch.linspace(-1, 2, len(tokens))).sum()
        if entropy is not None:
            loss = loss + (entropy * torch.linspace(2, -1, len(tokens))).sum()
        loss.backward()
        found.append((logprobs, hidden.grad, weight.grad, bias.grad))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_softmaxed_in_float32(dtype: torch.dtype) -> None:
    """Logits rounded to half give the float32 log-softmax of exactly those logits."""
    hidden, weight, bias, tokens = head(dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    got, entropy = linear_logprobs(hidden, weight, bias, tokens, 0.9, with_entropy=True)
    assert entropy is not None
    assert got.dtype == entropy.dtype == torch.float32
    assert token_logprobs(logits, tokens).dtype == torch.float32
    assert entropy_from_logits(logits).dtype == torch.float32
    torch.testing.assert_close(got, token_logprobs(logits.float(), tokens, 0.9))
    torch.testing.assert_close(entropy, entropy_from_logits(logits.float(), 0.9))
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype


def test_half_precision_weight_gradients_are_summed_in_float32() -> None:
    """Many one-row chunks: a bfloat16 running sum would stall at 2^8 times its step."""
    rows = 600
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(rows, dtype=torch.long)
    linear_logprobs(hidden, weight, bias, tokens, chunk=1)[0].sum().backward()
    for grad in (weight.grad, bias.grad):
        assert grad is not None
        assert grad.dtype == torch.bfloat16
        assert grad.flatten().tolist() == [300.0, -300.0]


def test_autocast_settles_the_precision_of_both_passes() -> None:
    """Under autocast the logits are rounded once, and the gradients come back in float32."""
    hidden, weight, bias, tokens = head(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, _ = linear_logprobs(hidden, weight, bias, tokens)
        logits = torch.nn.functional.linear(hidden, weight, bias)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(got, token_logprobs(logits, tokens))
    got.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32


def test_a_wide_sum_is_made_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the weight at a time, the last ones too; the gradient is the same."""
    gradients = []
    for added in (module.ADDED, 2 * D, 1):
        monkeypatch.setattr(module, "ADDED", added)
        hidden, weight, bias, tokens = head(torch.bfloat16)
        linear_logprobs(hidden, weight, bias, tokens, chunk=2)[0].sum().backward()
        gradients.append(weight.grad)
    assert gradients[0] is not None
    assert gradients[0].count_nonzero() == V * D
    assert all(torch.equal(gradients[0], other) for other in gradients)


def test_forbidden_tokens_add_no_entropy() -> None:
    """A logit of minus infinity is a probability of zero, in the gradient too."""
    logits = torch.tensor([[1.0, 1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    entropy = entropy_from_logits(logits)
    assert entropy.item() == pytest.approx(math.log(2), rel=1e-12)
    (grad,) = torch.autograd.grad(entropy.sum(), logits)
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4)])
def test_the_vocabulary_is_the_last_axis(shape: tuple[int, ...]) -> None:
    """Any number of axes before it, as if each position were alone."""
    rng = torch.Generator().manual_seed(5)
    logits = torch.randn(*shape, V, generator=rng, dtype=torch.float64)
    tokens = torch.randint(0, V, shape, generator=rng)
    flat = logits.reshape(-1, V)
    logprobs = token_logprobs(flat, tokens.reshape(-1)).reshape(shape)
    assert torch.equal(token_logprobs(logits, tokens), logprobs)
    assert torch.equal(entropy_from_logits(logits), entropy_from_logits(flat).reshape(shape))
    assert torch.equal(full_kl(logits, -logits), full_kl(flat, -flat).reshape(shape))


def test_large_logits_do_not_overflow() -> None:
    """The softmax is shifted before it is exponentiated."""
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], dtype=torch.float64)
    got = token_logprobs(logits, torch.tensor([1, 0]))
    assert got.tolist() == [-1e4, pytest.approx(-math.log(2), rel=1e-9)]
    assert entropy_from_logits(logits).tolist() == [0.0, pytest.approx(math.log(2))]


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.floats(-10, 10), st.floats(0.1, 5))
def test_probabilities_sum_to_one(values: list[float], shift: float, temperature: float) -> None:
    """Whatever the logits; adding a constant to them changes nothing; entropy is in 0..log V."""
    logits = torch.tensor(values, dtype=torch.float64)
    n = len(values)
    rows, tokens = logits.expand(n, n), torch.arange(n)
    logprobs = token_logprobs(rows, tokens, temperature)
    assert logprobs.exp().sum().item() == pytest.approx(1.0, rel=1e-9)
    torch.testing.assert_close(token_logprobs(rows + shift, tokens, temperature), logprobs)
    assert -1e-9 <= entropy_from_logits(logits, temperature) <= math.log(n) + 1e-9


def test_temperature_is_not_forgotten() -> None:
    """Negative control: another temperature gives other numbers."""
    hidden, weight, bias, tokens = head()
    warm, _ = linear_logprobs(hidden, weight, bias, tokens, 1.0)
    cold, _ = linear_logprobs(hidden, weight, bias, tokens, 0.5)
    assert not torch.allclose(warm, cold)
    assert torch.equal(linear_logprobs(hidden, weight, bias, tokens)[0], warm)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_impossible_settings_are_refused(temperature: float) -> None:
    """Temperatures and chunks that mean nothing."""
    hidden, weight, bias, tokens = head()
    logits = hidden @ weight.T
    with pytest.raises(ValueError, match="temperature"):
        linear_logprobs(hidden, weight, bias, tokens, temperature)
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, tokens, temperature)
    with pytest.raises(ValueError, match="temperature"):
        entropy_from_logits(logits, temperature)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        linear_logprobs(hidden, weight, bias, tokens, chunk=0)


def test_no_position_at_all() -> None:
    """An empty batch gives an empty result and zero gradients."""
    hidden, weight, bias, tokens = head()
    got, entropy = linear_logprobs(hidden[:0], weight, bias, tokens[:0], with_entropy=True)
    assert entropy is not None
    (got.sum() + entropy.sum()).backward()
    assert got.shape == (0,)
    assert weight.grad is not None
    assert (weight.grad == 0).all()
