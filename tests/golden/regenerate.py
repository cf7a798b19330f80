"""Write the golden vectors: `python tests/golden/regenerate.py [folder]`.

Each file holds `{"name", "cases": [{"id", "inputs", "expected"}]}`; None is "unspecified". Inputs
are seeded and rounded to four places; expected values come from `loops.py`, double precision.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import loops

Case = dict[str, Any]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]]
HOLES = [[0, 1, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 1]]


def matrix(rng: random.Random, rows: int, columns: int, spread: float = 1.0) -> loops.Mat:
    """Normal numbers with four places."""
    return [[round(rng.gauss(0, spread), 4) for _ in range(columns)] for _ in range(rows)]


def case(name: str, inputs: Case, expected: Case) -> Case:
    """One case of a file."""
    return {"id": name, "inputs": inputs, "expected": expected}


def each(function: Callable[..., float], *tables: loops.Mat) -> loops.Mat:
    """Apply a function of numbers element by element."""
    return [[function(*v) for v in zip(*rows, strict=True)] for rows in zip(*tables, strict=True)]


def check_slope(function: Callable[..., float], slope: float, at: float, *rest: float) -> float:
    """Stop when a hand-derived derivative disagrees with central differences."""
    step = 1e-6
    difference = (function(at + step, *rest) - function(at - step, *rest)) / (2 * step)
    if abs(difference - slope) > 1e-6 * max(1.0, abs(slope)):
        raise SystemExit(f"hand-derived gradient {slope} but differences say {difference}")
    return slope


def masked_whiten(rng: random.Random) -> list[Case]:
    """Masked moments and whitening."""
    cases = []
    for name, mask in (("padded", MASK), ("holes", HOLES)):
        x = matrix(rng, 4, 5, 2.0)
        kept = loops.counted(x, mask)
        expected: Case = {"masked_mean": loops.mean(kept)}
        for ddof, bias in ((0, "biased"), (1, "unbiased")):
            expected[f"masked_var_{bias}"] = loops.variance(kept, ddof)
            for keep, shift in ((False, "shift"), (True, "keepmean")):
                table = loops.whiten(x, mask, ddof, 1e-8, keep_mean=keep)
                expected[f"whiten_{bias}_{shift}"] = table
        cases.append(case(name, {"x": x, "mask": mask}, expected))
    return cases


def gae(rng: random.Random) -> list[Case]:
    """Advantages and returns, with padding, holes and a bootstrap."""
    cases = []
    settings = itertools.product(
        (("padded", MASK), ("holes", HOLES)), (1.0, 0.9, 0.0), (1.0, 0.95, 0.0)
    )
    for (name, mask), gamma, lam in settings:
        rewards, values, last = matrix(rng, 4, 5), matrix(rng, 4, 5), matrix(rng, 1, 4)[0]
        bootstrap = last if gamma == 0.9 else [0.0] * 4
        advantages, returns = loops.gae_rows(rewards, values, mask, gamma, lam, bootstrap)
        _, critic = loops.gae_rows(rewards, values, mask, gamma, 1.0, bootstrap)
        inputs = {"rewards": rewards, "values": values, "mask": mask, "gamma": gamma, "lam": lam}
        expected = {"advantages": advantages, "returns": returns, "returns_lam_critic_1": critic}
        cases.append(
            case(f"{name}_gamma{gamma}_lam{lam}", {**inputs, "bootstrap": bootstrap}, expected)
        )
    lengths = [40, 100, 1000, 8000]
    lams = {"lam": [1 - 1 / (0.05 * n) for n in lengths]}
    cases.append(case("length_adaptive_lambda", {"alpha": 0.05, "lengths": lengths}, lams))
    return cases


def kl_estimators(rng: random.Random) -> list[Case]:
    """Per-token estimators and the KL over a vocabulary."""
    cases = []
    for name, spread in (("near", 0.1), ("far", 2.0)):
        new, ref = matrix(rng, 2, 5), matrix(rng, 2, 5, spread)
        ref = each(lambda a, b: round(a + b, 4), new, ref)
        expected = {
            "k1": each(lambda p, q: p - q, new, ref),
            "abs": each(lambda p, q: abs(p - q), new, ref),
            "k2_mse": each(lambda p, q: (p - q) ** 2 / 2, new, ref),
            "k3": each(lambda p, q: math.expm1(q - p) - (q - p), new, ref),
        }
        cases.append(case(name, {"logprobs": new, "ref_logprobs": ref}, expected))
    p_rows = [loops.softmax(row) for row in matrix(rng, 4, 6)]
    q_rows = [loops.softmax(row) for row in matrix(rng, 4, 6, 2.0)]
    kl = [
        math.fsum(p * math.log(p / q) for p, q in zip(*rows, strict=True))
        for rows in zip(p_rows, q_rows, strict=True)
    ]
    cases.append(case("full_distribution", {"p_rows": p_rows, "q_rows": q_rows}, {"kl": kl}))
    return cases


def adaptive_kl(rng: random.Random) -> list[Case]:
    """Twenty updates of the coefficient."""
    observed = [round(rng.uniform(-2, 14), 2) for _ in range(20)]
    cases = []
    for name, gain in (
        ("code_n512", {"n_steps": 512, "horizon": 10000}),
        ("paper", {"K_beta": 0.1}),
    ):
        inputs = {"init_kl_coef": 0.15, "target": 6.0, **gain, "kl_sequence": observed}
        rate = gain["n_steps"] / gain["horizon"] if "horizon" in gain else gain["K_beta"]
        coef, path = 0.15, []
        for kl in observed:
            coef *= 1 + rate * loops.clip(kl / 6.0 - 1, -0.2, 0.2)
            path.append(coef)
        cases.append(case(name, inputs, {"kl_coef_after_update": path}))
    return cases


def ppo_policy_loss(rng: random.Random) -> list[Case]:
    """Clipped surrogate, statistics, aggregations and relatives."""
    settings = itertools.product(
        ((0.2, 0.2, None), (0.2, 0.28, None), (0.1, 0.3, 3.0)), (MASK, HOLES)
    )
    return [*(policy_case(rng, *bounds, mask) for bounds, mask in settings), *off_policy(rng)]


def policy_case(
    rng: random.Random, low: float, high: float, dual: float | None, mask: loops.Mat
) -> Case:
    """One setting of the clipped surrogate."""
    old, adv = matrix(rng, 4, 5), matrix(rng, 4, 5)
    new = each(lambda a, b: round(a + b, 4), old, matrix(rng, 4, 5, 0.8))
    bounds = {"low": low, "high": high, "dual": dual}
    token = each(partial(loops.surrogate, **bounds), new, old, adv)
    slope = each(partial(loops.surrogate_slope, **bounds), new, old, adv)
    each(partial(check_slope, partial(loops.surrogate, **bounds)), slope, new, old, adv)
    ratio = each(lambda n, o: math.exp(n - o), new, old)
    count = sum(map(sum, mask))
    cut = each(lambda r, a: -a * loops.clip(r, 1 - low, 1 + high) > -a * r, ratio, adv)
    outside = each(lambda r: not 1 - low <= r <= 1 + high, ratio)
    gap = loops.counted(each(lambda n, o: n - o, new, old), mask)
    rows = [loops.counted([t], [m]) for t, m in zip(token, mask, strict=True)]
    expected = {
        "ratio": ratio,
        "token_loss": token,
        "loss_token_mean": loops.mean(loops.counted(token, mask)),
        "loss_seq_mean_token_mean": loops.mean([loops.mean(row) for row in rows]),
        "loss_drgrpo_mean_over_seq_sum_over_T": math.fsum(map(math.fsum, rows)) / 20,
        "clipfrac_pg2_gt_pg1": loops.mean(loops.counted(cut, mask)),
        "clipfrac_ratio_outside": loops.mean(loops.counted(outside, mask)),
        "approxkl_half_sq": loops.mean([d * d / 2 for d in gap]),
        "approxkl_k3": loops.mean([math.expm1(d) - d for d in gap]),
        "policykl_mean_old_minus_new": -loops.mean(gap),
        "mean_ratio": loops.mean(loops.counted(ratio, mask)),
        "grad_loss_token_mean_wrt_new_logprobs": each(lambda s, m: s * m / count, slope, mask),
    }
    inputs = {"logprobs": new, "old_logprobs": old, "advantages": adv, "mask": mask}
    inputs |= {"clip_eps_low": low, "clip_eps_high": high, "dual_clip": dual}
    kind = "padded" if mask is MASK else "holes"
    return case(f"{kind}_low{low}_high{high}_dual{dual}", inputs, expected)


def off_policy(rng: random.Random) -> list[Case]:
    """CISPO, REINFORCE, sequence ratio and the sampler-mismatch weights on one input."""
    old, adv = matrix(rng, 4, 5), matrix(rng, 4, 5)
    new = each(lambda a, b: round(a + b, 4), old, matrix(rng, 4, 5, 0.8))
    count = sum(map(sum, MASK))
    weight = each(lambda n, o: min(math.exp(n - o), 1.28), new, old)
    loss = each(lambda w, a, n: -w * a * n, weight, adv, new)
    grad = each(lambda w, a, m: -w * a * m / count, weight, adv, MASK)
    inputs = {"logprobs": new, "old_logprobs": old, "advantages": adv, "mask": MASK}
    expected = {
        "loss_token_mean": loops.mean(loops.counted(loss, MASK)),
        "grad_wrt_new_logprobs": grad,
    }
    plain = loops.mean(loops.counted(each(lambda a, n: -a * n, adv, new), MASK))
    gaps = each(lambda n, o: n - o, new, old)
    mean_gap = [loops.mean(loops.counted([g], [m])) for g, m in zip(gaps, MASK, strict=True)]
    ratios = {
        "sequence_ratio": [math.exp(g) for g in mean_gap],
        "tis_cap2": each(lambda d: min(math.exp(d), 2.0), gaps),
        "icepop_0.5_2": each(lambda d: math.exp(d) if 0.5 <= math.exp(d) <= 2 else 0.0, gaps),
    }
    return [
        case("cispo", {**inputs, "ratio_max": 1.28}, expected),
        case("reinforce", inputs, {"loss_token_mean": plain}),
        case("ratios", inputs, ratios),
    ]


def value_loss(rng: random.Random) -> list[Case]:
    """Clipped value loss and what is reported about the critic."""
    return [value_case(rng, *pair) for pair in itertools.product((0.2, 5.0), (MASK, HOLES))]


def value_case(rng: random.Random, eps: float, mask: loops.Mat) -> Case:
    """One setting of the value loss."""
    old, target = matrix(rng, 4, 5), matrix(rng, 4, 5)
    new = each(lambda a, b: round(a + b, 4), old, matrix(rng, 4, 5, 0.3))
    bound = {"eps": eps}
    token = each(partial(loops.value_loss, **bound), new, old, target)
    slope = each(partial(loops.value_slope, **bound), new, old, target)
    each(partial(check_slope, partial(loops.value_loss, **bound)), slope, new, old, target)
    error = loops.counted(each(lambda v, t: t - v, new, target), mask)
    mse, spread = loops.mean([e * e for e in error]), loops.variance(loops.counted(target, mask), 0)
    held = each(lambda v, o: loops.clip(v, o - eps, o + eps), new, old)
    cut = each(lambda v, h, t: (h - t) ** 2 > (v - t) ** 2, new, held, target)
    count = sum(map(sum, mask))
    expected = {
        "token_loss": token,
        "loss_masked_mean": loops.mean(loops.counted(token, mask)),
        "loss_unclipped": mse / 2,
        "vf_clipfrac": loops.mean(loops.counted(cut, mask)),
        "var_explained": 1 - mse / spread,
        "var_explained_centred": 1 - loops.variance(error, 0) / spread,
        "grad_loss_masked_mean_wrt_values": each(lambda s, m: s * m / count, slope, mask),
    }
    inputs = {"values": new, "old_values": old, "returns": target, "mask": mask}
    kind = "padded" if mask is MASK else "holes"
    return case(f"{kind}_eps{eps}", {**inputs, "cliprange_value": eps}, expected)


def pairwise_rm_loss(rng: random.Random) -> list[Case]:
    """Pairs with margin and centring, best of n, rankings."""
    cases = []
    for margin, centre in ((0.0, 0.0), (0.5, 0.0), (0.3, 0.01)):
        chosen, rejected = matrix(rng, 1, 6, 2.0)[0], matrix(rng, 1, 6, 2.0)[0]
        both = list(zip(chosen, rejected, strict=True))
        per_pair = [loops.softplus(r + margin - c) + centre * (c + r) ** 2 for c, r in both]
        pull = [(loops.sigmoid(r + margin - c), 2 * centre * (c + r)) for c, r in both]
        expected = {
            "loss": loops.mean(per_pair),
            "per_pair": per_pair,
            "grad_chosen": [(z - s) / 6 for s, z in pull],
            "grad_rejected": [(z + s) / 6 for s, z in pull],
            "accuracy_strict": loops.mean([c > r for c, r in both]),
        }
        inputs = {"chosen": chosen, "rejected": rejected, "margin": margin, "center_coef": centre}
        cases.append(case(f"margin{margin}_centre{centre}", inputs, expected))
    scores, best = matrix(rng, 3, 4), [2, 0, 3]
    picked = [-math.log(loops.softmax(row)[b]) for row, b in zip(scores, best, strict=True)]
    expected = {"loss": loops.mean(picked), "per_query": picked}
    cases.append(case("best_of_4", {"rewards": scores, "best": best}, expected))
    ranks = [[0, 1, 2, 3], [1, 0, 1, 2], [3, 2, 1, 1]]
    per_query = []
    for row, rank in zip(scores, ranks, strict=True):
        pairs = [(i, j) for i in range(4) for j in range(4) if rank[i] < rank[j]]
        per_query.append(loops.mean([loops.softplus(row[j] - row[i]) for i, j in pairs]))
    cases.append(case("k_wise", {"rewards": scores, "ranks": ranks}, {"per_query": per_query}))
    return cases


def dpo(rng: random.Random) -> list[Case]:
    """DPO and its relatives."""
    cases = []
    keys = (
        "policy_chosen_logps",
        "policy_rejected_logps",
        "ref_chosen_logps",
        "ref_rejected_logps",
    )
    for beta, smooth in ((0.1, 0.0), (0.5, 0.1)):
        table = [[round(v - 30, 4) for v in matrix(rng, 1, 5, 5.0)[0]] for _ in keys]
        pc, pr, rc, rr = table
        lengths = [rng.randint(5, 30) for _ in range(10)]
        gains = [(a - c, b - d) for a, b, c, d in zip(pc, pr, rc, rr, strict=True)]
        h = [a - b for a, b in gains]
        loss = [
            (1 - smooth) * loops.softplus(-beta * x) + smooth * loops.softplus(beta * x) for x in h
        ]
        slope = [beta * (smooth - loops.sigmoid(-beta * x)) / 5 for x in h]
        clean = [
            (1 - smooth) * loops.softplus(-beta * x) - smooth * loops.softplus(beta * x) for x in h
        ]
        per_token = [
            g[0] / lc - g[1] / lr for g, lc, lr in zip(gains, lengths[:5], lengths[5:], strict=True)
        ]
        expected = {
            "sigmoid_per_pair": loss,
            "grad_policy_chosen": slope,
            "grad_policy_rejected": [-s for s in slope],
            "robust_loss": loops.mean(clean) / (1 - 2 * smooth),
            "chosen_rewards": [beta * g[0] for g in gains],
            "ipo_sum_loss": loops.mean([(x - 0.5 / beta) ** 2 for x in h]),
            "ipo_length_normalised_loss_trl_head": loops.mean(
                [(x - 0.5 / beta) ** 2 for x in per_token]
            ),
            "hinge_loss": loops.mean([max(0.0, 1 - beta * x) for x in h]),
        }
        inputs = dict(zip(keys, table, strict=True)) | {"beta": beta, "label_smoothing": smooth}
        inputs |= {"len_chosen": lengths[:5], "len_rejected": lengths[5:]}
        cases.append(case(f"beta{beta}_smooth{smooth}", inputs, expected))
    return cases


def rloo_grpo(rng: random.Random) -> list[Case]:
    """Group baselines."""
    scores = matrix(rng, 3, 4)
    flat = [v for row in scores for v in row]
    rloo = [[v - (math.fsum(row) - v) / (len(row) - 1) for v in row] for row in scores]
    centred = [[v - loops.mean(row) for v in row] for row in scores]
    stds = {d: [math.sqrt(loops.variance(row, d)) for row in scores] for d in (0, 1)}
    flat_rloo = [v for row in rloo for v in row]

    def grpo(ddof: int, eps: float) -> loops.Mat:
        return [[v / (s + eps) for v in row] for row, s in zip(centred, stds[ddof], strict=True)]

    whole = math.sqrt(loops.variance(flat, 1)) + 1e-4
    spread = math.sqrt(loops.variance(flat_rloo, 1)) + 1e-4
    expected = {
        "rloo": rloo,
        "rloo_normalised_trl_eps1e-4": each(lambda v: (v - loops.mean(flat_rloo)) / spread, rloo),
        "grpo_trl_unbiased_eps1e-4": grpo(1, 1e-4),
        "grpo_verl_unbiased_eps1e-6": grpo(1, 1e-6),
        "grpo_openrlhf_unbiased_eps1e-9": grpo(1, 1e-9),
        "grpo_biased_std_eps1e-8": grpo(0, 1e-8),
        "dr_grpo_centered_only": centred,
        "group_mean_batch_std_trl_eps1e-4": each(lambda v: v / whole, centred),
    }
    return [case("continuous_k4", {"rewards_by_group": scores}, expected)]


def truncated_rewards(rng: random.Random) -> list[Case]:
    """Cutting after the EOS, and the price of length."""
    cases = []
    for eos, pad, start in ((2, 0, 0), (2, 2, 0), (3, 9, 3)):
        rows = [[rng.randint(1, 5) for _ in range(7)] for _ in range(6)] + [[1] * 7, [eos] * 7]
        cut, lengths, ended = [], [], []
        for row in rows:
            places = [i for i, token in enumerate(row) if token == eos and i >= start]
            n = places[0] + 1 if places else len(row)
            cut.append(row[:n] + [pad] * (7 - n))
            lengths.append(n)
            ended.append(bool(places))
        mask = [[int(i < n) for i in range(7)] for n in lengths]
        expected = {
            "truncated": cut,
            "contains_eos": ended,
            "lengths": lengths,
            "action_mask": mask,
        }
        inputs = {"responses": rows, "eos": eos, "pad": pad, "start": start}
        cases.append(case(f"eos{eos}_pad{pad}_start{start}", inputs, expected))
    lengths = [1, 15, 16, 17, 19, 20, 50]
    penalty = [-2.0 * min(max(0, n - 16), 4) / 4 for n in lengths]
    inputs = {"lengths": lengths, "max_len": 20, "buffer": 4, "factor": 2.0}
    return [*cases, case("overlong", inputs, {"penalty": penalty})]


def running_moments(rng: random.Random) -> list[Case]:
    """Moments against all scores seen at once."""
    batches = [matrix(rng, 1, n, 2.0)[0] for n in (4, 1, 7)]
    seen: loops.Vec = []
    after = []
    for batch in batches:
        seen = [*seen, *batch]
        std = math.sqrt(loops.variance(seen, 1))
        moments = {"mean": loops.mean(seen), "var": loops.variance(seen, 0), "std": std}
        scaled = {"scores_scaled_by_running_std": [v / std for v in batch]}
        scaled |= {"scores_normalised": [(v - moments["mean"]) / std for v in batch]}
        after.append(moments | {"count": float(len(seen))} | scaled)
    return [case("three_batches", {"batches": batches}, {"after_each": after})]


def reward_normalisation(rng: random.Random) -> list[Case]:
    """Gain and bias of a reward model."""
    scores = matrix(rng, 1, 12, 2.0)[0]
    gain = 1.5 / math.sqrt(loops.variance(scores, 0))
    bias = 0.25 - gain * loops.mean(scores)
    inputs = {"scores": scores, "target_mean": 0.25, "target_std": 1.5}
    expected = {"gain": gain, "bias": bias, "normalised": [gain * v + bias for v in scores]}
    return [case("to_target", inputs, expected)]


def entropy_temperature(rng: random.Random) -> list[Case]:
    """Log-probabilities and entropies of tempered logits."""
    logits, tokens = matrix(rng, 3, 7, 2.0), [0, 3, 6]
    cases = []
    for temperature in (1.0, 0.7, 0.1, 3.0):
        probs = [loops.softmax(row, temperature) for row in logits]
        logprobs = [math.log(row[t]) for row, t in zip(probs, tokens, strict=True)]
        inputs = {"logits": logits, "tokens": tokens, "temperature": temperature}
        expected = {"logprobs": logprobs, "entropy": [loops.entropy(row) for row in probs]}
        cases.append(case(f"temperature_{temperature}", inputs, expected))
    return cases


def position_ids(_: random.Random) -> list[Case]:
    """Positions of attended tokens."""
    mask = [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [1, 0, 1, 0, 1]]
    places = [[sum(row[:i]) for i in range(5)] for row in mask]
    return [case("padding_and_holes", {"mask": mask}, {"exclusive_cumsum": places})]


def kl_regularised_optimum(_: random.Random) -> list[Case]:
    """The best distribution and its objective."""
    ref, rewards = [0.35, 0.25, 0.2, 0.15, 0.05], [0.2, -0.5, 1.0, 1.5, -1.0]
    cases = []
    for beta in (0.5, 1.0, 5.0):
        probs, best = loops.optimum(ref, rewards, beta)
        kl = math.fsum(p * math.log(p / q) for p, q in zip(probs, ref, strict=True))
        expected = {"optimal_probs": probs, "kl": kl, "beta_log_Z": best}
        inputs = {"ref_probs": ref, "rewards": rewards, "beta": beta}
        cases.append(case(f"beta{beta}", inputs, expected))
    return cases


def overoptimisation(_: random.Random) -> list[Case]:
    """Best-of-n KL and Gao's curves."""
    n, d = [1, 2, 5, 100, 5000], [0.5, 1.0, 2.0, 3.5, 8.0]
    kl = [math.log(k) - (k - 1) / k for k in n]
    inputs = {"alpha": 0.9, "beta": 0.2, "d": d}
    curves = {"R_bon": [x * (0.9 - 0.2 * x) for x in d]}
    curves |= {"R_rl": [x * (0.9 - 0.2 * math.log(x)) for x in d]}
    return [
        case("best_of_n_kl", {"n": n}, {"kl_nats": kl}),
        case("functional_forms", inputs, curves),
    ]


FILES = (
    masked_whiten, gae, kl_estimators, adaptive_kl, ppo_policy_loss, value_loss, pairwise_rm_loss,
    dpo, rloo_grpo, truncated_rewards, running_moments, reward_normalisation, entropy_temperature,
    position_ids, kl_regularised_optimum, overoptimisation,
)  # fmt: skip


def main(folder: Path) -> None:
    """Write every file into a folder."""
    for number, build in enumerate(FILES):
        rng = random.Random(20_000 + number)  # noqa: S311  numbers, not secrets
        content = {"name": build.__name__, "cases": build(rng)}
        text = json.dumps(content, separators=(",", ":")).replace('{"id"', '\n{"id"')
        (folder / f"{build.__name__}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
