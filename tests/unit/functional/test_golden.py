"""Every formula against plain-loop numbers: ours in tests/golden, others' in SUASION_REFERENCE.

Both folders have one format, so one table of checks reads both. A key of a file that this table
does not know is another library's variant and has no counterpart here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suasion.functional import advantages as adv
from suasion.functional import kl, logprobs, losses, masking, overoptimisation, preference, rewards
from suasion.functional import statistics as stats

OURS = Path(__file__).parents[2] / "golden"
Results = dict[str, Callable[[], Any]]


def tensor(values: Any) -> Tensor:
    """Float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def flags(values: Any) -> Tensor:
    """Boolean tensor."""
    return torch.tensor(values).bool()


def masked_whiten(i: dict[str, Any]) -> Results:
    """Masked moments."""
    x, mask = tensor(i["x"]), flags(i["mask"])
    return {
        "masked_mean": lambda: masking.masked_mean(x, mask),
        "token_mean": lambda: masking.masked_mean(x, mask),
        "mean_of_sequence_means": lambda: masking.masked_mean(x, mask, dim=1).mean(),
        "mean_of_sequence_sums": lambda: masking.masked_sum(x, mask, dim=1).mean(),
        "masked_var_biased": lambda: masking.masked_var(x, mask, ddof=0),
        "masked_var_unbiased": lambda: masking.masked_var(x, mask, ddof=1),
        "whiten_biased_shift": lambda: masking.whiten(x, mask),
        "whiten_biased_keepmean": lambda: masking.whiten(x, mask, shift_mean=False),
        "whiten_unbiased_shift": lambda: masking.whiten(x, mask, ddof=1),
        "whiten_unbiased_keepmean": lambda: masking.whiten(x, mask, ddof=1, shift_mean=False),
    }


def gae(i: dict[str, Any]) -> Results:
    """Advantages and returns."""
    if "alpha" in i:
        lengths = torch.tensor(i["lengths"])
        return {"lam": lambda: adv.length_adaptive_lam(lengths, alpha=i["alpha"])}
    flat = not isinstance(i["rewards"][0], list)
    r, v = tensor(i["rewards"]), tensor(i["values"])
    mask = flags(i["mask"]) if "mask" in i else torch.ones_like(r).bool()
    last = i.get("bootstrap", [i.get("bootstrap_value", 0.0)] * (1 if flat else len(r)))
    if flat:
        r, v, mask = r[None], v[None], mask[None]

    def shaped(x: Tensor) -> Tensor:
        return x[0] if flat else x

    run = partial(adv.gae, r, v, mask, gamma=i["gamma"], lam=i["lam"], bootstrap=tensor(last))
    return {
        "advantages": lambda: shaped(run()[0]),
        "returns": lambda: shaped(run()[1]),
        "returns_lam_critic_1": lambda: shaped(run(lam_critic=1.0)[1]),
        "skip_masked_advantages_on_mask": lambda: run()[0][mask],
    }


def kl_estimators(i: dict[str, Any]) -> Results:
    """KL estimators."""
    if "p_rows" in i:
        p, q = tensor(i["p_rows"]).log(), tensor(i["q_rows"]).log()
        return {"kl": lambda: kl.full_kl(p, q)}
    new, ref = tensor(i["logprobs"]), tensor(i["ref_logprobs"])
    return {
        "k1": lambda: kl.k1(new, ref),
        "k1_sum_per_seq": lambda: kl.k1(new, ref).sum(dim=1),
        "abs": lambda: kl.absolute_difference(new, ref),
        "k2_mse": lambda: kl.k2(new, ref),
        "k3": lambda: kl.k3(new, ref),
        "k3_verl_in20_out10": lambda: kl.k3(new, ref, log_ratio_clamp=20.0).clamp(-10, 10),
    }


def adaptive_kl(i: dict[str, Any]) -> Results:
    """KL controllers."""
    if "horizon" in i:
        settings = {"n": i["n_steps"], "horizon": i["horizon"]}
        step = partial(kl.adaptive_kl_coef, target=i["target"], **settings)
    else:
        step = partial(kl.paper_kl_coef, target=i["target"], gain=i["K_beta"])
    path = [i["init_kl_coef"]]
    for observed in i["kl_sequence"]:
        path.append(step(path[-1], observed))
    return {"kl_coef_after_update": lambda: tensor(path[1:])}


def ppo_policy_loss(i: dict[str, Any]) -> Results:
    """Policy losses and their statistics."""
    new, advantages = tensor(i["logprobs"]).requires_grad_(), tensor(i["advantages"])
    mask = flags(i["mask"])
    if "old_logprobs" not in i:
        loss = losses.policy_gradient(new, advantages)
        return {"loss_token_mean": lambda: masking.masked_mean(loss, mask)}
    old = tensor(i["old_logprobs"])
    if "ratio_max" in i:
        loss = losses.cispo(new, old, advantages, ratio_max=i["ratio_max"])
        mean = masking.masked_mean(loss, mask)
        return {
            "loss_token_mean": lambda: mean,
            "grad_wrt_new_logprobs": lambda: torch.autograd.grad(mean, new)[0],
        }
    if "clip_eps_low" not in i:
        return off_policy(new, old, advantages, mask)
    clip = {"clip_low": i["clip_eps_low"], "clip_high": i["clip_eps_high"]}
    loss = losses.clipped_surrogate(new, old, advantages, **clip, dual_clip=i.get("dual_clip"))
    token_mean = masking.masked_mean(loss, mask)
    weights = masking.sequence_mean_weights(mask)
    width = mask.shape[1]
    return {
        "ratio": lambda: losses.importance_ratio(new, old),
        "token_loss": lambda: loss,
        "loss_token_mean": lambda: token_mean,
        "loss_seq_mean_token_sum": lambda: masking.masked_sum(loss, mask, dim=1).mean(),
        "loss_seq_mean_token_mean": lambda: (weights * loss).sum() / len(mask),
        "loss_drgrpo_mean_over_seq_sum_over_T": lambda: (
            masking.masked_sum(loss, mask, dim=1).mean() / width
        ),
        "clipfrac_pg2_gt_pg1": lambda: stats.clip_fraction(new, old, advantages, mask, **clip),
        "clipfrac_ratio_outside": lambda: stats.ratio_outside_fraction(new, old, mask, **clip),
        "approxkl_half_sq": lambda: stats.approx_kl_k2(new, old, mask),
        "approxkl_k3": lambda: stats.approx_kl_k3(new, old, mask),
        "policykl_mean_old_minus_new": lambda: stats.policy_kl(new, old, mask),
        "mean_ratio": lambda: masking.masked_mean(losses.importance_ratio(new, old), mask),
        "grad_loss_token_mean_wrt_new_logprobs": lambda: torch.autograd.grad(token_mean, new)[0],
    }


def off_policy(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Results:
    """Corrections for old samples."""
    plain = masking.masked_mean(losses.policy_gradient(new, advantages), mask)
    sequence = partial(losses.sequence_mean_logprobs, mask=mask)
    return {
        "loss_token_mean": lambda: plain,
        "sequence_ratio": lambda: losses.importance_ratio(sequence(new), sequence(old)),
        "tis_cap2": lambda: losses.truncated_importance_weights(new, old),
        "icepop_0.5_2": lambda: losses.icepop_weights(new, old),
    }


def value_loss(i: dict[str, Any]) -> Results:
    """Critic."""
    values, old = tensor(i["values"]).requires_grad_(), tensor(i["old_values"])
    returns, mask, clip = tensor(i["returns"]), flags(i["mask"]), i["cliprange_value"]
    loss = losses.clipped_value_loss(values, old, returns, clip=clip)
    mean = masking.masked_mean(loss, mask)
    plain = losses.clipped_value_loss(values, old, returns, clip=None)
    return {
        "token_loss": lambda: loss,
        "loss_masked_mean": lambda: mean,
        "loss_unclipped": lambda: masking.masked_mean(plain, mask),
        "error_mse": lambda: 2 * masking.masked_mean(plain, mask),
        "vf_clipfrac": lambda: stats.value_clip_fraction(values, old, returns, mask, clip=clip),
        "returns_var_biased": lambda: masking.masked_var(returns, mask, ddof=0),
        "var_explained": lambda: stats.explained_variance(values, returns, mask, centred=False),
        "var_explained_centred": lambda: stats.explained_variance(values, returns, mask),
        "grad_loss_masked_mean_wrt_values": lambda: torch.autograd.grad(mean, values)[0],
    }


def pairwise_rm_loss(i: dict[str, Any]) -> Results:
    """Reward-model losses."""
    if "ranks" in i:
        ranks = torch.tensor(i["ranks"])
        return {"per_query": lambda: preference.k_wise_loss(tensor(i["rewards"]), ranks)}
    if "best" in i:
        picked = preference.best_of_n_loss(tensor(i["rewards"]), torch.tensor(i["best"]))
        return {"per_query": lambda: picked, "loss": picked.mean}
    if "chosen" not in i:
        return {}
    chosen, rejected = tensor(i["chosen"]).requires_grad_(), tensor(i["rejected"]).requires_grad_()
    margin = i.get("margin", 0.0)
    loss = preference.pairwise_loss(
        chosen,
        rejected,
        margin=tensor(margin) if isinstance(margin, list) else margin,
        centring=i.get("center_coef", 0.0),
    )

    def grad(of: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), of, retain_graph=True)[0]

    return {
        "loss": loss.mean,
        "per_pair": lambda: loss,
        "grad_chosen": lambda: grad(chosen),
        "grad_rejected": lambda: grad(rejected),
        "accuracy_strict": lambda: stats.pairwise_accuracy(chosen, rejected),
        "mean_margin": (chosen - rejected).mean,
    }


def dpo(i: dict[str, Any]) -> Results:
    """DPO family."""
    policy = [tensor(i[f"policy_{k}_logps"]).requires_grad_() for k in ("chosen", "rejected")]
    ref = [tensor(i[f"ref_{k}_logps"]) for k in ("chosen", "rejected")]
    ratios = [p - r for p, r in zip(policy, ref, strict=True)]
    lengths = [torch.tensor(i[f"len_{k}"]) for k in ("chosen", "rejected")]
    beta, smooth = i["beta"], {"label_smoothing": i["label_smoothing"]}
    loss = preference.dpo_loss(*ratios, beta=beta, **smooth)
    rewarded = [
        preference.implicit_rewards(*pair, beta=beta) for pair in zip(policy, ref, strict=True)
    ]

    def grad(of: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), of, retain_graph=True)[0]

    return {
        "sigmoid_loss": loss.mean,
        "sigmoid_per_pair": lambda: loss,
        "robust_loss": lambda: preference.robust_dpo_loss(*ratios, beta=beta, **smooth).mean(),
        "grad_policy_chosen": lambda: grad(policy[0]),
        "grad_policy_rejected": lambda: grad(policy[1]),
        "chosen_rewards": lambda: rewarded[0],
        "rejected_rewards": lambda: rewarded[1],
        "accuracy": lambda: stats.pairwise_accuracy(*rewarded),
        "ipo_sum_loss": lambda: preference.ipo_loss(*ratios, beta=beta).mean(),
        "ipo_length_normalised_loss_trl_head": lambda: preference.ipo_loss_per_token(
            *ratios, *lengths, beta=beta
        ).mean(),
        "hinge_loss": lambda: preference.hinge_dpo_loss(*ratios, beta=beta).mean(),
    }


def rloo_grpo(i: dict[str, Any]) -> Results:
    """Group baselines."""
    scores = tensor(i["rewards_by_group"])
    return {
        "rloo": lambda: adv.leave_one_out(scores),
        "rloo_normalised_trl_eps1e-4": lambda: adv.batch_standardised(adv.leave_one_out(scores)),
        "grpo_trl_unbiased_eps1e-4": lambda: adv.group_relative(scores),
        "grpo_verl_unbiased_eps1e-6": lambda: adv.group_relative(scores, eps=1e-6),
        "grpo_openrlhf_unbiased_eps1e-9": lambda: adv.group_relative(scores, eps=1e-9),
        "grpo_biased_std_eps1e-8": lambda: adv.group_relative(scores, ddof=0, eps=1e-8),
        "dr_grpo_centered_only": lambda: adv.group_centred(scores),
        "group_mean_batch_std_trl_eps1e-4": lambda: adv.group_centred_batch_scaled(scores),
        "group_baseline_then_global_whiten_reinforce_pp_baseline": lambda: masking.whiten(
            adv.group_centred(scores), torch.ones_like(scores).bool(), ddof=1
        ),
    }


def truncated_rewards(i: dict[str, Any]) -> Results:
    """Truncation."""
    if "max_len" in i:
        settings = {"max_length": i["max_len"], "buffer": i["buffer"], "factor": i["factor"]}
        lengths = torch.tensor(i["lengths"])
        return {"penalty": lambda: rewards.overlong_penalty(lengths, **settings)}
    tokens = torch.tensor(i["responses"])
    eos, pad = i.get("eos", i.get("truncate_token")), i.get("pad", i.get("padding_token"))
    start = i.get("start", i.get("truncate_after", 0))
    cut, counts, ended = masking.truncate_after_eos(tokens, eos=eos, pad=pad, start=start)
    mask = masking.length_mask(counts, tokens.shape[1])
    return {
        "truncated": lambda: cut,
        "contains_eos": lambda: ended,
        "passes_filter": lambda: ended,
        "lengths": lambda: counts,
        "last_token_index": lambda: rewards.last_token_index(mask),
        "action_mask": lambda: mask,
    }


def running_moments(i: dict[str, Any]) -> Results:
    """Reward scaling."""

    def after_each() -> list[dict[str, Any]]:
        moments, out = rewards.RunningMoments(), []
        for batch in map(tensor, i["batches"]):
            moments = moments.update(batch)
            scale = partial(rewards.scale_scores, batch, std=moments.std, eps=0.0)
            state = {k: getattr(moments, k) for k in ("mean", "var", "std", "count")}
            scaled = {"scores_scaled_by_running_std": scale()}
            out.append(state | scaled | {"scores_normalised": scale(mean=moments.mean)})
        return out

    return {"after_each": after_each}


def reward_normalisation(i: dict[str, Any]) -> Results:
    """Gain and bias."""
    if "scores" not in i:
        return {}
    scores, target = tensor(i["scores"]), {k: i[k] for k in ("target_mean", "target_std")}
    gain, bias = rewards.affine_normalisation(scores, **target)
    return {"gain": lambda: gain, "bias": lambda: bias, "normalised": lambda: gain * scores + bias}


def entropy_temperature(i: dict[str, Any]) -> Results:
    """Tempered logits."""
    logits, tokens, t = tensor(i["logits"]), torch.tensor(i["tokens"]), i["temperature"]
    return {
        "logprobs": lambda: logprobs.token_logprobs(logits, tokens, t),
        "entropy": lambda: logprobs.entropy_from_logits(logits, t),
    }


def position_ids(i: dict[str, Any]) -> Results:
    """Positions."""
    return {"exclusive_cumsum": lambda: masking.position_ids(flags(i["mask"]))}


def overopt(i: dict[str, Any]) -> Results:
    """Gao's forms."""
    if "n" in i:
        return {"kl_nats": lambda: list(map(overoptimisation.best_of_n_kl, i["n"]))}
    d, shape = tensor(i["d"]), {"alpha": i["alpha"], "beta": i["beta"]}
    return {
        "R_bon": lambda: overoptimisation.gao_best_of_n(d, **shape),
        "R_rl": lambda: overoptimisation.gao_rl(d, **shape),
    }


TABLE: dict[str, Callable[[dict[str, Any]], Results]] = {
    "overoptimisation": overopt,
    **{
        function.__name__: function
        for function in (
            masked_whiten, gae, kl_estimators, adaptive_kl, ppo_policy_loss, value_loss,
            pairwise_rm_loss, dpo, rloo_grpo, truncated_rewards, running_moments,
            reward_normalisation, entropy_temperature, position_ids,
        )
    },
}  # fmt: skip


def assert_equal(got: Any, expected: Any, where: str) -> None:
    """Compare nested numbers within 1e-9, skipping what the file leaves unspecified."""
    got = got.tolist() if isinstance(got, Tensor) else got
    if expected is None:
        return
    if isinstance(expected, dict):
        for key in expected.keys() & got.keys():
            assert_equal(got[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), where
        for n, pair in enumerate(zip(got, expected, strict=True)):
            assert_equal(*pair, f"{where}[{n}]")
    else:
        assert abs(got - expected) <= 1e-9 * max(1.0, abs(expected)), f"{where}: {got} {expected}"


def compare(folder: Path, name: str) -> int:
    """Check one file; the number of expected entries that had a counterpart."""
    checked = 0
    for case in json.loads((folder / f"{name}.json").read_text())["cases"]:
        results = TABLE[name](case["inputs"])
        for key in case["expected"].keys() & results.keys():
            assert_equal(results[key](), case["expected"][key], f"{name}/{case['id']}/{key}")
            checked += 1
    return checked


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    """Functions that make their own floats make doubles here."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", sorted(TABLE))
def test_our_golden_numbers(name: str) -> None:
    """Every expected entry of our files has a counterpart and equals it."""
    cases = json.loads((OURS / f"{name}.json").read_text())["cases"]
    assert compare(OURS, name) == sum(len(case["expected"]) for case in cases)


def test_golden_files_are_what_the_loops_write(tmp_path: Path) -> None:
    """The committed numbers are those of the committed loops."""
    subprocess.run([sys.executable, str(OURS / "regenerate.py"), str(tmp_path)], check=True)  # noqa: S603
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in OURS.glob("*.json")}


@pytest.mark.skipif("SUASION_REFERENCE" not in os.environ, reason="SUASION_REFERENCE is unset")
def test_reference_golden_numbers() -> None:
    """Independent numbers, where a folder of them is at hand."""
    for name in TABLE:
        assert compare(Path(os.environ["SUASION_REFERENCE"]), name) > 0
