"""The policy loop: roll out, score, optimise; log, sample, save.

Every random number comes from a generator made of the seed, a name and the iteration, so the loop
has no generator state: an iteration cut off by a kill is simply done again, with the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from suasion.config.schema import PpoConfig, ResponseConfig
from suasion.core.errors import ModelError, TrainingError
from suasion.core.files import append_json_line, keep_json_lines, read_json_lines
from suasion.core.progress import Meter
from suasion.core.ranks import ALONE, Ranks, checksum
from suasion.core.records import Rollout
from suasion.core.seeding import generator
from suasion.data.codec import Codec
from suasion.functional.advantages import gae
from suasion.functional.kl import adaptive_kl_coef, fixed_kl_coef, k1
from suasion.models.arithmetic import Arithmetic, float32_products
from suasion.models.references import Reference
from suasion.models.roles import Critic, Policy, TrunkCritic
from suasion.rollout.experience import Experience, Penalty, build_experience
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
    penalty: Penalty = k1
    """What the coefficient weighs in the reward, where the penalty is there."""
    notes: tuple[str, ...] = ()
    """What is to be said about the chosen options before the run."""
    arithmetic: Arithmetic = field(default_factory=partial(Arithmetic, "fp32"))
    """Of the run; the trainer's autocast is its."""


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
        ranks: The processes that run the loop together, on one folder. Each samples and scores some
            of the rows, all of them know all, and the first one writes.
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
        ranks: Ranks = ALONE,
    ) -> None:
        self.parts = parts
        self.config = config
        self.folder = folder
        self.seed = seed
        self.console = console
        self.log = log
        self.observe = observe
        self.ranks = ranks
        self.history: list[dict[str, float]] = []
        held = parts.reference is not None
        self.kl_coef = config.kl.coef if held else 0.0
        self.shaper = ScoreShaper(config.score, config.response.max_tokens)
        self.estimate = partial(
            gae, gamma=config.gamma, lam=config.lam, lam_critic=config.critic.lam
        )
        self.next_kl_coef = (
            partial(
                adaptive_kl_coef,
                target=config.kl.target,
                n=config.batch_size,
                horizon=config.kl.horizon,
            )
            if config.kl.adaptive and held
            else fixed_kl_coef
        )

    def run(self) -> dict[str, float]:
        """Do all iterations that are left.

        Returns:
            Steps, and the first and last iteration's reward and KL.
        """
        c = self.config
        begun = self._resume()
        self._agree()
        with Meter(self.console, "ppo", c.steps, "step") as meter:
            meter.start_at(begun)
            if begun == 0:
                self._record_samples(0)
            for step in range(begun, c.steps):
                stats = self.iteration(step)
                done = step + 1
                if self.ranks.first:
                    self._write(done, stats)
                if c.samples and (done % c.sample_every == 0 or done == c.steps):
                    self._record_samples(done)
                if done % c.save_every == 0 or done == c.steps:
                    self._save(done)
                note = f"reward {stats['env/reward_mean']:.2f}  KL {stats['objective/kl']:.2f}"
                meter.reach(done, note)
        return self.ranks.share(self._summary)

    def _write(self, done: int, stats: dict[str, float]) -> None:
        """Log an iteration, and what is worth a warning about it."""
        append_json_line(self.folder / "metrics.jsonl", {"step": done, **stats})
        self.log(stats, done)
        self.history.append({"step": done, **stats})
        for message in self.observe(self.history):
            self.console.print(f"  step {done}: {message}", style="yellow", markup=False)
            append_json_line(self.folder / "warnings.jsonl", {"step": done, "message": message})

    def _summary(self) -> dict[str, float]:
        rows = list(read_json_lines(self.folder / "metrics.jsonl"))
        return {
            "steps": float(self.config.steps),
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
        with p.trainer.autocast():
            raw = torch.tensor(self._scores(queries, texts), dtype=torch.float32)
        lengths = torch.tensor([len(ids) for ids in rollout.responses])
        scores = self.shaper(raw, torch.tensor(rollout.finished), lengths)
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
            self.parts,
            self.config.response,
            queries,
            self.seed,
            stream,
            shortest=shortest,
            ranks=self.ranks,
        )

    def _scores(self, queries: Sequence[str], texts: Sequence[str]) -> list[float]:
        """The reward of every text; each process has some of them scored."""

        def work(rows: list[int]) -> list[float]:
            return self.parts.reward([queries[i] for i in rows], [texts[i] for i in rows])

        return self.ranks.each_row(len(texts), work)

    def _experience(self, rollout: Rollout, scores: torch.Tensor) -> Experience:
        p = self.parts
        in_loss = self.config.kl.in_loss is not None
        return build_experience(
            rollout,
            scores,
            policy=p.policy,
            reference=p.reference,
            critic=p.critic,
            estimate=self.estimate,
            kl_coef=0.0 if in_loss else self.kl_coef,
            loss_kl_coef=self.kl_coef if in_loss else 0.0,
            whiten_advantages=self.config.whiten == "batch",
            pad_id=p.codec.pad_id,
            batch_tokens=self.config.micro_batch_tokens,
            penalty=p.penalty,
            each_row=self.ranks.each_row,
        )

    def _record_samples(self, step: int) -> None:
        """Answer the fixed prompts, with the same random numbers each time."""
        if not self.parts.fixed:
            return
        rollout = self._roll_out(self.parts.fixed, ("samples", 0), None)
        texts = [self.parts.codec.text_of(ids) for ids in rollout.responses]
        with self.parts.trainer.autocast():
            scores = self._scores(self.parts.fixed, texts)
        if not self.ranks.first:
            return
        for index, (query, text, score) in enumerate(
            zip(self.parts.fixed, texts, scores, strict=True)
        ):
            row = {"step": step, "index": index, "query": query, "response": text, "score": score}
            append_json_line(self.folder / "samples.jsonl", row)

    def _modules(self) -> dict[str, nn.Module]:
        return {"policy": self.parts.policy.module, "critic": self.parts.critic.module}

    def _save(self, done: int) -> None:
        self._agree()
        if not self.ranks.first:
            return
        t = self.parts.trainer
        state = {
            "kl_coef": self.kl_coef,
            "moments": self.shaper.state(),
            "reference": self._held_to(),
        }
        save_checkpoint(
            self.folder / "checkpoints", done, self._modules(), t.optimizer, t.schedule, state
        )

    def _held_to(self) -> str:
        """Which reference it is."""
        return self.parts.reference.identity() if self.parts.reference else "none"

    def _require_reference(self, stored: str, done: int) -> None:
        """Refuse to go on held to something else than before.

        Raises:
            ModelError: the reference is another one than in the checkpoint.
        """
        found = self._held_to()
        if found != stored:
            raise ModelError(
                f"{self.folder}: iteration {done} was held to the reference {stored[:12]}, this "
                f"run would be held to {found[:12]}: its KL would leap",
                "put back the model folders and ppo.reference that the run began with, or choose "
                "another --out folder",
            )

    def _agree(self) -> None:
        """All processes have the same weights, or none of them goes on.

        Raises:
            TrainingError: they have not.
        """
        if self.ranks.world == 1:
            return
        for name, module in self._modules().items():
            learned = [p for p in module.parameters() if p.requires_grad]
            self.ranks.agree(
                f"the checksum of the {name}'s weights",
                checksum(learned),
                "give every process the same model folders, versions and kind of device",
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
            self._require_reference(state.get("reference", ""), done)
        self.ranks.agree(
            "the iteration to go on from", done, "give all processes one folder to write to"
        )
        for name in ("metrics.jsonl", "samples.jsonl", "warnings.jsonl"):
            path = self.folder / name
            if self.ranks.first and path.is_file():
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
    ranks: Ranks = ALONE,
) -> Rollout:
    """Answer `queries` as the loop does.

    Args:
        parts: Of these the policy, and the critic where it is on its trunk.
        response: How responses are sampled.
        queries: Prompts.
        seed: Root seed.
        stream: Names the random numbers.
        shortest: Set: each response's limit is drawn from [shortest, max_tokens].
        ranks: Processes that answer some of the queries each; all of them get all answers.
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
    uniforms = uniform_rows(seed, stream, limits)
    parts.policy.model.eval()

    def work(rows: Sequence[int]) -> Rollout:
        with parts.trainer.autocast(), float32_products(parts.arithmetic.decoding):
            return sample(
                parts.policy,
                [parts.codec.prompt_ids(queries[row]) for row in rows],
                [limits[row] for row in rows],
                [uniforms[row] for row in rows],
                stop_ids=parts.codec.stop_ids,
                pad_id=parts.codec.pad_id,
                sampling=Sampling.of(response),
                value=parts.critic.of if isinstance(parts.critic, TrunkCritic) else None,
                slots=response.at_once,
                text_of=parts.codec.text_of,
            )

    if ranks.world == 1:
        return work(range(len(queries)))
    return Rollout.joined(ranks.each_row(len(queries), lambda rows: work(rows).split()))


def uniform_rows(
    seed: int, stream: tuple[str | int, ...], limits: Sequence[int]
) -> list[torch.Tensor]:
    """Uniform numbers for each row of a rollout, each from a generator of its own."""
    return [
        torch.rand(limit, generator=generator(seed, *stream, row), dtype=torch.float64)
        for row, limit in enumerate(limits)
    ]
