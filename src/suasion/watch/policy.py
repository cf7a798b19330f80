"""Checks on the policy: does everything that asks it for a probability get the same answer?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from suasion.core.records import TokenBatch, token_batch
from suasion.models.modes import modes_kept
from suasion.watch.finding import Finding, does_not_apply
from suasion.watch.subject import EXACT, Gap, Subject

SURPRISE = 5.0
"""Standard errors by which the mean log-probability of sampled tokens may miss minus the entropy;
chance exceeds it once in two million checks."""
NEVER = 1e-8
"""A stop token whose probability stays below this was suppressed: no trained model is so sure."""
SHARE_ENDED = 0.01
"""Least share of responses that must be able to end, where not ending costs the score."""
LEAK = 1e-3
"""Largest difference of a logit between a packed document and the same one alone; a leak changes
logits by whole units, arithmetic by 1e-6 to 1e-4."""


def reference(subject: Subject) -> Finding:
    """The KL to the reference is zero before the first step."""
    if subject.parts.reference is None:
        return does_not_apply("reference", "the run has no reference")
    batch = subject.batch
    with torch.no_grad(), subject.parts.trainer.autocast():
        held_to = subject.parts.reference.logprobs(batch).float()
    own = subject.logprobs(batch)
    gap = Gap.between(own, held_to)
    per_response = float((own - held_to).sum()) / len(subject.rollout)
    if not subject.starts_held:
        return Finding(
            "reference",
            ok=math.isfinite(gap.largest),
            measured={"kl": per_response, "largest": gap.largest},
            what="the reference gives log-probabilities that are no numbers",
            likely_cause="a damaged model folder, or one in a precision that overflows",
            fix="take another model for ppo.reference.model",
        )
    return Finding(
        "reference",
        ok=gap.within(EXACT),
        measured={"kl": per_response, **_shown(gap, EXACT)},
        what=f"before any step the KL to the reference is {per_response:.3g} nats per response, "
        f"one token differs by {gap.largest:.2g}: the penalty would pull towards another model",
        likely_cause="the reference is the raw base while the policy starts from an adapter (or "
        "model) that was fine-tuned, or one of the two has dropout on",
        fix="give the supervised adapter's folder as ppo.model, of which ppo.reference.kind start "
        "keeps a snapshot; or merge the supervised adapter into the base first",
    )


def padding(subject: Subject) -> Finding:
    """Log-probabilities and values do not depend on padding or on the micro-batch."""
    rows = list(zip(subject.rollout.queries, subject.rollout.responses, strict=True))
    pad_id, device = subject.parts.codec.pad_id, subject.parts.policy.device
    alone = [[row] for row in rows]
    pairs = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    arrangements = {
        "alone": [_right(group, pad_id).to(device) for group in alone],
        "right": [_right(rows, pad_id).to(device)],
        "left": [_left(_right(rows, pad_id)).to(device)],
        "pairs": [_right(group, pad_id).to(device) for group in pairs],
    }
    with subject.nudged():
        found = {
            name: (
                torch.cat([subject.logprobs(batch) for batch in batches]),
                torch.cat([subject.values(batch) for batch in batches]),
            )
            for name, batches in arrangements.items()
        }
    logprobs, values = found.pop("alone")
    gaps = {
        f"{kind}_{name}": Gap.between(own, other)
        for name, others in found.items()
        for kind, own, other in zip(("logprobs", "values"), (logprobs, values), others, strict=True)
    }
    tolerance = subject.tolerance()
    off = [f"{n} by {gap.largest:.2g}" for n, gap in gaps.items() if not gap.within(tolerance)]
    return Finding(
        "padding",
        ok=not off,
        measured={name: gap.largest for name, gap in gaps.items()}
        | {"rms": max(gap.rms for gap in gaps.values()), "tolerance": tolerance.largest},
        what=f"padding or batching changes results against the same rows one by one: "
        f"{', '.join(off)}",
        likely_cause="position ids that count padding (absolute positions need cumsum(mask) - 1), "
        "an attention mask that is not passed on, or the wrong padding side",
        fix="pass mask and position ids on in every forward pass of the model",
    )


def modes(subject: Subject) -> Finding:
    """Training and evaluation mode compute the same."""
    batch, found = subject.batch, {}
    with subject.nudged(), modes_kept(*subject.modules.values()):
        for mode in (False, True):
            for module in subject.modules.values():
                module.train(mode)
            found[mode] = (subject.logprobs(batch), subject.values(batch))
    logprobs, values = (Gap.between(*each) for each in zip(found[True], found[False], strict=True))
    return Finding(
        "modes",
        ok=logprobs.within(EXACT) and values.within(EXACT),
        measured={
            "logprobs": logprobs.largest,
            "values": values.largest,
            "tolerance": EXACT.largest,
        },
        what=f"training mode differs from evaluation mode: log-probabilities by "
        f"{logprobs.largest:.2g}, values by {values.largest:.2g}",
        likely_cause="dropout is on, or 8-bit layers compute otherwise when training",
        fix="set every dropout probability to 0 for the policy and critic; with 8-bit layers take "
        "rollout and update in one mode",
    )


def sampler(subject: Subject) -> Finding:
    """The sampler reports what the trainer computes, and samples what it reports."""
    looked_at = [_Looked.at(subject, row) for row in range(len(subject.rollout))]
    computed = torch.cat([look.logprobs for look in looked_at])
    gap = Gap.between(computed, torch.cat(list(subject.rollout.logprobs)))
    tolerance = subject.tolerance()
    surplus = sum(float((look.logprobs + look.entropies).sum()) for look in looked_at)
    variance = sum(float(look.variances.sum()) for look in looked_at)
    errors = surplus / math.sqrt(variance) if variance > 0 else 0.0
    s = subject.sampling
    problems = []
    if not gap.within(tolerance):
        problems.append(f"sampler and trainer disagree by {gap.largest:.2g} nats about one token")
    if s.alters_distribution:
        how = f"top_k {s.top_k}, top_p {s.top_p:g}, min_tokens {s.min_tokens}"
        how += ", greedy" if s.greedy else ""
        problems.append(f"{how} sample from another distribution than the one that is scored")
    elif abs(errors) > SURPRISE:
        problems.append(
            f"sampled tokens are {'likelier' if errors > 0 else 'rarer'} than chance allows, by "
            f"{abs(errors):.1f} standard errors: they come from another distribution"
        )
    return Finding(
        "sampler",
        ok=not problems,
        measured={**_shown(gap, tolerance), "standard_errors": errors},
        what="; ".join(problems) + ": the KL would be biased and can turn negative",
        likely_cause="top-k, top-p or minimum lengths in sampling, a temperature that is not in "
        "the log-probabilities, or a rollout engine with other weights",
        fix="set response.top_k 0, top_p 1 and min_tokens 0; divide logits by the temperature in "
        "sampling and scoring alike",
    )


def stop(subject: Subject) -> Finding:
    """Responses can end: the stop token exists, is not suppressed, and is reached."""
    ids = list(subject.parts.codec.stop_ids)
    vocabulary = subject.vocabulary
    inside = [i for i in ids if 0 <= i < vocabulary]
    looked_at = [_Looked.at(subject, row, inside) for row in range(len(subject.rollout))]
    highest = max(float(look.stops.max()) for look in looked_at)
    can_end = []
    for look, did in zip(looked_at, subject.rollout.finished, strict=True):
        missed = float(torch.log1p(-look.stops.double().clamp(max=1 - 1e-12)).mean())
        can_end.append(1.0 if did else -math.expm1(missed * subject.max_tokens))
    expected = sum(can_end) / len(can_end)
    ended = sum(subject.rollout.finished) / len(can_end)
    problems = [f"generation_config.json {how}" for how in _suppressed(subject, inside)]
    if len(inside) < len(ids):
        outside = [i for i in ids if i not in inside]
        problems.append(f"stop tokens {outside} are not in the vocabulary of {vocabulary}")
    if highest < NEVER:
        problems.append(f"the stop token's probability never exceeds {highest:.1g}")
    if subject.must_end and expected < SHARE_ENDED:
        problems.append(
            f"{expected:.2%} of the responses would end within {subject.max_tokens} tokens, and "
            "one that does not end loses its score (score.no_eos)"
        )
    return Finding(
        "stop",
        ok=not problems,
        measured={"ended": ended, "expected_to_end": expected, "highest_probability": highest},
        what="; ".join(problems),
        likely_cause="supervised texts without the EOS at their end, EOS masked out of their loss "
        "because it is the padding token too, a minimum length, or suppressed tokens",
        fix="end every supervised text with the stop token and count it in the loss; take minimum "
        "lengths and suppressed tokens out of generation_config.json; allow longer responses",
    )


def packing(subject: Subject) -> Finding:
    """Documents packed into one row do not see each other, where the run claims so."""
    if not subject.isolated:
        return does_not_apply("packing", "blocks do not claim to keep documents apart")
    r = subject.rollout
    documents = [q + a for q, a in zip(r.queries, r.responses, strict=True)][:3]
    leak = packing_leak(subject.parts.policy.model, documents)
    return Finding(
        "packing",
        ok=leak <= LEAK,
        measured={"leak": leak, "tolerance": LEAK},
        what=f"packed documents see each other: logits differ by {leak:.2g} from each alone",
        likely_cause="a key-value cache or an attention mask given together with position ids, or "
        "a family whose attention does not read position ids (OPT, BLOOM)",
        fix="pack with position ids, use_cache False and no mask, for llama, qwen, neox and gpt2; "
        "else pad",
    )


@torch.no_grad()
def packing_leak(model: Any, documents: Sequence[Sequence[int]], **options: Any) -> float:
    """Largest difference of a logit between documents packed into one row and each alone.

    Packed as transformers documents it for padding-free training: position ids that begin again at
    each document, no attention mask.

    Args:
        model: A causal LM.
        documents: Token ids, at least two documents.
        options: Of the packed forward pass; default `use_cache=False`.
    """
    device = next(model.parameters()).device
    with modes_kept(model):
        model.eval()
        ids = torch.tensor([[token for each in documents for token in each]], device=device)
        places = [place for each in documents for place in range(len(each))]
        packed = model(
            input_ids=ids,
            position_ids=torch.tensor([places], device=device),
            **({"use_cache": False} | options),
        ).logits[0]
        alone = [
            model(input_ids=torch.tensor([list(each)], device=device), use_cache=False).logits[0]
            for each in documents
        ]
    return float((packed - torch.cat(alone)).abs().max())


def _shown(gap: Gap, tolerance: Gap) -> dict[str, float]:
    return {"largest": gap.largest, "rms": gap.rms, "tolerance": tolerance.largest}


class _Looked:
    """The distributions behind one response. Fields are [R], one number per token."""

    def __init__(self, logits: Tensor, tokens: Tensor, stop_ids: Sequence[int]) -> None:
        every = logits.float().log_softmax(-1)
        probs = every.exp()
        self.logprobs = every.gather(-1, tokens[:, None])[:, 0]
        # A token of probability zero has no log-probability to weigh.
        weighed = torch.where(probs > 0, probs * every, 0.0)
        self.entropies = -weighed.sum(-1)
        squares = torch.where(probs > 0, weighed * every, 0.0).sum(-1)
        self.variances = (squares - self.entropies**2).clamp(min=0)
        self.stops = probs[:, list(stop_ids)].sum(-1)

    @classmethod
    @torch.no_grad()
    def at(cls, subject: Subject, row: int, stop_ids: Sequence[int] = ()) -> _Looked:
        """Of one response of the rollout: the vocabulary times all responses may not fit."""
        policy, r = subject.parts.policy, subject.rollout
        batch = _right([(r.queries[row], r.responses[row])], subject.parts.codec.pad_id)
        batch = batch.to(policy.device)
        with subject.parts.trainer.autocast():
            hidden = policy(batch.ids, batch.mask).last_hidden_state[batch.predicts]
            return cls(policy.logits(hidden), batch.targets, stop_ids)


def _right(rows: Sequence[tuple[list[int], list[int]]], pad_id: int) -> TokenBatch:
    return token_batch([query for query, _ in rows], [answer for _, answer in rows], pad_id)


def _left(batch: TokenBatch) -> TokenBatch:
    """The same rows with their padding on the left."""
    shifts = (~batch.mask).sum(-1).tolist()

    def moved(rows: Tensor) -> Tensor:
        return torch.stack(
            [torch.roll(row, shift) for row, shift in zip(rows, shifts, strict=True)]
        )

    return TokenBatch(moved(batch.ids), moved(batch.mask), moved(batch.predicts))


def _suppressed(subject: Subject, stop_ids: Sequence[int]) -> list[str]:
    """What in the model's own generation settings keeps a response from ending."""
    settings = getattr(subject.parts.policy.model, "generation_config", None)
    found = [
        f"sets {name} {value}, which suppresses the stop token until then"
        for name in ("min_length", "min_new_tokens")
        if (value := getattr(settings, name, None))
    ]
    found += [
        f"has the stop token in {name}"
        for name in ("suppress_tokens", "begin_suppress_tokens")
        if set(getattr(settings, name, None) or ()) & set(stop_ids)
    ]
    if any([stop_id] in (getattr(settings, "bad_words_ids", None) or []) for stop_id in stop_ids):
        found.append("has the stop token in bad_words_ids")
    return found
