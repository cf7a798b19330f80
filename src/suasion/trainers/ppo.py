"""The policy loop: roll out, score, optimise; log, sample, save.

Every random number comes from a generator made of the seed, a name and the iteration, so the loop
has no generator state: an iteration cut off by a kill is simply done again, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from suasion.config.schema import PpoConfig, ResponseConfig
from suasion.core.errors import TrainingError
from suasion.core.files import append_json_line, keep_json_lines, read_json_lines
from suasion.core.progress import Meter
from suasion.core.records import Rollout
from suasion.core.seeding import generator
from suasion.data.codec import Codec
from suasion.functional.advantages import gae
from suasion.functional.kl import adaptive_kl_coef, fixed_kl_coef
from suasion.models.roles import Critic, Policy, Reference, TrunkCritic
from suasion.rollout.experience import Experience, build_experience
from suasion.rollout.rewards import Checked
from suasion.rollout.sampler import Sampling, sample
from suasion.trainers.checkpoint import load_newest, save_checkpoint
from suasion.trainers.policy import PolicyTrainer
from suasion.trainers.ppo_stats import experience_statistics, text_statistics
from suasion.trainers.scoring import ScoreShaper

Log = Callable[[dict[str, float], int], None]
Observe = Callable[[Sequence[dict[str, float]]], list[str]]
"""(statistics of every iteration so far) -> warnings about the last one."""


@dataclass(frozen=True)
class PpoParts:
    """The objects a policy run is made of; built in `suasion.cli.build`."""

    policy: Policy
    """Learns."""
    reference: Reference | None
    """What it is held to."""
    critic: Critic
    """Learns beside it."""
    trainer: PolicyTrainer
    """Makes the optimizer steps."""
    reward: Checked
    """Scores texts."""
    codec: Codec
    """The policy's tokenizer and template."""
    queries: list[str]
    """Prompts to learn on; they fit the context."""
    fixed: list[str]
    """Prompts whose responses are recorded as training goes."""


class PpoLoop:
    """Runs the iterations.

    Args:
        parts: What it works with.
        config: The numbers.
        folder: Gets metrics.jsonl, samples.jsonl and checkpoints/.
        seed: Root of every generator.
        console: For progress.
        log: Receives each iteration's statistics, for trackers.
        observe: Looks at the statistics after each iteration; its warnings are shown and written.
    """

    def __init__(
        self,
        parts: PpoParts,
        config: PpoConfig,
        *,
        folder: Path,
        seed: int,
        console: Console,
        log: Log,
        observe: Observe = lambda _: [],
    ) -> None:
        self.parts = parts
        self.config = config
        self.folder = folder
        self.seed = seed
        self.console = console
        self.log = log
        self.observe = observe
        self.history: list[dict[str, float]] = []
        self.kl_coef = config.kl.coef
        self.shaper = ScoreShaper(config.score)
        self.estimate = partial(gae, gamma=config.gamma, lam=config.lam)
        self.next_kl_coef = (
            partial(
                adaptive_kl_coef,
                target=config.kl.target,
                n=config.batch_size,
                horizon=config.kl.horizon,
            )
            if config.kl.adaptive
            else fixed_kl_coef
        )

    def run(self) -> dict[str, float]:
        """Do all iterations that are left.

        Returns:
            Steps, and the first and last iteration's reward and KL.
        """
        c = self.config
        begun = self._resume()
        with Meter(self.console, "ppo", c.steps, "step") as meter:
            meter.start_at(begun)
            if begun == 0:
                self._record_samples(0)
            for step in range(begun, c.steps):
                stats = self.iteration(step)
                done = step + 1
                append_json_line(self.folder / "metrics.jsonl", {"step": done, **stats})
                self.log(stats, done)
                self.history.append({"step": done, **stats})
                for message in self.observe(self.history):
                    self.console.print(f"  step {done}: {message}", style="yellow", markup=False)
                    append_json_line(
                        self.folder / "warnings.jsonl", {"step": done, "message": message}
                    )
                if c.samples and (done % c.sample_every == 0 or done == c.steps):
                    self._record_samples(done)
                if done % c.save_every == 0 or done == c.steps:
                    self._save(done)
                note = f"reward {stats['env/reward_mean']:.2f}  KL {stats['objective/kl']:.2f}"
                meter.reach(done, note)
        rows = list(read_json_lines(self.folder / "metrics.jsonl"))
        return {
            "steps": float(c.steps),
            "score_first": rows[0]["env/reward_mean"],
            "score_last": rows[-1]["env/reward_mean"],
            "kl_last": rows[-1]["objective/kl"],
            "kl_coef_last": rows[-1]["objective/kl_coef"],
        }

    def iteration(self, step: int) -> dict[str, float]:
        """Roll out, score and optimise once.

        Raises:
            TrainingError: a loss or gradient is not finite.
        """
        c, p = self.config, self.parts
        clock = [time.perf_counter()]
        queries = self._queries_of(step)
        rollout = self._roll_out(queries, ("rollout", step), c.response.min_sampled)
        clock.append(time.perf_counter())
        texts = [p.codec.text_of(ids) for ids in rollout.responses]
        raw = torch.tensor(p.reward(queries, texts), dtype=torch.float32)
        scores = self.shaper(raw, torch.tensor(rollout.finished))
        clock.append(time.perf_counter())
        with p.trainer.autocast():
            experience = self._experience(rollout, scores)
        clock.append(time.perf_counter())
        update = p.trainer.optimise(
            experience,
            generator(self.seed, "mini-batches", step),
            critic_only=step < c.critic.warmup,
        )
        clock.append(time.perf_counter())
        stats = experience_statistics(experience, raw, rollout.finished) | update
        stats |= text_statistics(texts)
        stats["ppo/learning_rate"] = float(p.trainer.optimizer.param_groups[0]["lr"])
        broken = [k for k, v in stats.items() if not torch.isfinite(torch.tensor(v))]
        if broken:
            raise TrainingError(
                f"iteration {step + 1}: {', '.join(broken)} is not a finite number",
                "lower the learning rate, or raise ppo.kl.coef; the last checkpoint is kept",
            )
        names = ("rollout", "score", "experience", "optimise")
        spans = {f"time/ppo/{n}": clock[i + 1] - clock[i] for i, n in enumerate(names)}
        self.kl_coef = self.next_kl_coef(self.kl_coef, stats["objective/kl"])
        return {**stats, **spans, "time/ppo/total": clock[-1] - clock[0]}

    def _queries_of(self, step: int) -> list[str]:
        """The prompts of an iteration: each pass over them in an order of its own."""
        count, size = len(self.parts.queries), self.config.batch_size
        chosen = []
        orders: dict[int, list[int]] = {}
        for index in range(step * size, (step + 1) * size):
            epoch, at = divmod(index, count)
            if epoch not in orders:
                order = torch.randperm(count, generator=generator(self.seed, "prompts", epoch))
                orders[epoch] = order.tolist()
            chosen.append(self.parts.queries[orders[epoch][at]])
        return chosen

    def _roll_out(
        self, queries: Sequence[str], stream: tuple[str, int], shortest: int | None
    ) -> Rollout:
        return roll_out(
            self.parts, self.config.response, queries, self.seed, stream, shortest=shortest
        )

    def _experience(self, rollout: Rollout, scores: torch.Tensor) -> Experience:
        p = self.parts
        return build_experience(
            rollout,
            scores,
            policy=p.policy,
            reference=p.reference,
            critic=p.critic,
            estimate=self.estimate,
            kl_coef=self.kl_coef,
            whiten_advantages=self.config.whiten == "batch",
            pad_id=p.codec.pad_id,
            batch_tokens=self.config.micro_batch_tokens,
        )

    def _record_samples(self, step: int) -> None:
        """Answer the fixed prompts, with the same random numbers each time."""
        if not self.parts.fixed:
            return
        rollout = self._roll_out(self.parts.fixed, ("samples", 0), None)
        texts = [self.parts.codec.text_of(ids) for ids in rollout.responses]
        scores = self.parts.reward(self.parts.fixed, texts)
        for index, (query, text, score) in enumerate(
            zip(self.parts.fixed, texts, scores, strict=True)
        ):
            row = {"step": step, "index": index, "query": query, "response": text, "score": score}
            append_json_line(self.folder / "samples.jsonl", row)

    def _modules(self) -> dict[str, nn.Module]:
        return {"policy": self.parts.policy.model, "critic": self.parts.critic.module}

    def _save(self, done: int) -> None:
        t = self.parts.trainer
        state = {"kl_coef": self.kl_coef, "moments": self.shaper.state()}
        save_checkpoint(
            self.folder / "checkpoints", done, self._modules(), t.optimizer, t.schedule, state
        )

    def _resume(self) -> int:
        """Restore the newest whole checkpoint; finished iterations."""
        t = self.parts.trainer
        state, refused = load_newest(
            self.folder / "checkpoints", self._modules(), t.optimizer, t.schedule
        )
        for message in refused:
            self.console.print(f"  {message}", style="yellow", highlight=False)
        done = 0
        if state is not None:
            done = int(state["step"])
            self.kl_coef = float(state["kl_coef"])
            self.shaper.restore(state["moments"])
        for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
            path = self.folder / name
            if path.is_file():
                rows = [row for row in read_json_lines(path) if done and row["step"] <= done]
                keep_json_lines(path, rows)
                if name == "metrics.jsonl":
                    self.history = rows
        return done


def roll_out(
    parts: PpoParts,
    response: ResponseConfig,
    queries: Sequence[str],
    seed: int,
    stream: tuple[str, int],
    *,
    shortest: int | None = None,
) -> Rollout:
    """Answer `queries` as the loop does.

    Args:
        parts: Of these the policy, and the critic where it is on its trunk.
        response: How responses are sampled.
        queries: Prompts.
        seed: Root seed.
        stream: Names the random numbers.
        shortest: Set: each response's limit is drawn from [shortest, max_tokens].
    """
    limits = [response.max_tokens] * len(queries)
    if shortest is not None:
        lengths = torch.randint(
            shortest,
            response.max_tokens + 1,
            (len(queries),),
            generator=generator(seed, "lengths", *stream),
        )
        limits = lengths.tolist()
    parts.policy.model.eval()
    with parts.trainer.autocast():
        return sample(
            parts.policy,
            [parts.codec.prompt_ids(query) for query in queries],
            limits,
            uniform_rows(seed, stream, limits),
            stop_ids=parts.codec.stop_ids,
            pad_id=parts.codec.pad_id,
            sampling=Sampling(top_k=response.top_k, top_p=response.top_p),
            value=parts.critic.of if isinstance(parts.critic, TrunkCritic) else None,
        )


def uniform_rows(
    seed: int, stream: tuple[str | int, ...], limits: Sequence[int]
) -> list[torch.Tensor]:
    """Uniform numbers for each row of a rollout, each from a generator of its own."""
    return [
        torch.rand(limit, generator=generator(seed, *stream, row), dtype=torch.float64)
        for row, limit in enumerate(limits)
    ]
