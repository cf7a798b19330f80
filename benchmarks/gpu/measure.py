"""What is timed: rollout, PPO iteration and supervised step, ours and the plain way in turns."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.correct import autocast_of
from benchmarks.gpu.plain import PaddedUpdate, generate
from benchmarks.speed.floor import Model
from suasion.core.records import Rollout, token_batch
from suasion.functional.advantages import gae
from suasion.functional.losses import clipped_surrogate, clipped_value_loss
from suasion.models.references import FrozenReference
from suasion.models.roles import Policy, TrunkCritic, hidden_size_of
from suasion.rollout.experience import build_experience
from suasion.rollout.sampler import sample
from suasion.trainers.policy import PolicyTrainer, UpdateSettings

Row = dict[str, Any]
EPOCHS = 4
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A model and the work on it."""

    name: str
    layers: int
    width: int
    heads: int
    feed_forward: int
    vocabulary: int
    responses: int
    """Per iteration."""
    prompt: tuple[int, int]
    """Fewest and most tokens of a prompt."""
    response: tuple[int, int]
    """Fewest and most tokens of a response."""
    sequences: int
    """Of a supervised step, `block` tokens each."""
    block: int
    micro_tokens: int
    """Most tokens of a forward and backward pass."""

    @property
    def sizes(self) -> Model:
        """What decides the operations."""
        weights = self.layers * self.width * (4 * self.width + 3 * self.feed_forward)
        return Model(self.layers, self.width, self.vocabulary, weights)

    def model(self, device: torch.device) -> Any:
        """A random Llama of this shape."""
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        with torch.device(device):
            return LlamaForCausalLM(config).eval()


SHAPES = (
    Shape("0.1B", 12, 768, 12, 2048, 32000, 256, (64, 256), (32, 256), 64, 1024, 32768),
    Shape("1.5B", 28, 2048, 16, 5632, 32000, 128, (64, 256), (32, 256), 16, 1024, 16384),
)
DRY = Shape("dry", 2, 32, 2, 64, 300, 6, (3, 8), (2, 6), 4, 16, 64)


def ceilings(device: torch.device, *, size: int) -> dict[str, float]:
    """Rates of large matrix products and of a copy within the device's memory."""
    found: dict[str, float] = {}
    for name, kind in KINDS.items():
        left, right = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
        found[f"{name} flops"] = 2 * size**3 / seconds_of(lambda: left @ right, device, 10)  # noqa: B023
    source = torch.randn(16 * size, size, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    found["copy bytes"] = moved / seconds_of(lambda: target.copy_(source), device, 10)
    return found


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    function()
    spans = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        spans.append(time.perf_counter() - began)
    return statistics.median(spans)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@dataclass
class Work:
    """The prompts of an iteration."""

    prompts: list[list[int]]
    limits: list[int]

    @classmethod
    def of(cls, shape: Shape) -> Work:
        """Drawn once."""
        generator = torch.Generator().manual_seed(2)

        def lengths(bounds: tuple[int, int]) -> list[int]:
            low, high = bounds
            drawn = torch.randint(low, high + 1, (shape.responses,), generator=generator)
            return [int(n) for n in drawn]

        prompts = [
            torch.randint(0, shape.vocabulary - 2, (n,), generator=generator).tolist()
            for n in lengths(shape.prompt)
        ]
        return cls(prompts, lengths(shape.response))


class Ours:
    """Our side, on the objects that `suasion ppo` builds.

    Args:
        shape: Model and work.
        device: Where.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape = shape
        self.autocast = autocast_of("bf16", device)
        self.policy = Policy(shape.model(device), 1.0)
        self.critic = TrunkCritic(hidden_size_of(self.policy))
        self.critic.module.to(device)
        self.reference = FrozenReference.copy_of(self.policy)
        parameters = [*self.policy.model.parameters(), *self.critic.module.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.pad_id = shape.vocabulary - 1
        settings = UpdateSettings(EPOCHS, shape.responses, shape.micro_tokens, 1.0, 0.1)
        self.trainer = PolicyTrainer(
            self.policy,
            self.critic,
            self.optimizer,
            schedule,
            partial(clipped_surrogate, clip_low=0.2, clip_high=0.2),
            partial(clipped_value_loss, clip=0.2),
            settings,
            pad_id=self.pad_id,
            autocast=self.autocast,
        )

    def roll_out(self, work: Work) -> Rollout:
        """Responses with log-probabilities and values."""
        generator = torch.Generator().manual_seed(3)
        uniforms = [torch.rand(n, generator=generator, dtype=torch.float64) for n in work.limits]
        with self.autocast():
            return sample(
                self.policy,
                work.prompts,
                work.limits,
                uniforms,
                stop_ids=[self.shape.vocabulary - 2],
                pad_id=self.pad_id,
                value=self.critic.of,
            )

    def responses(self, rollout: Rollout) -> list[list[int]]:
        """Its tokens."""
        return rollout.responses

    def learn(self, work: Work, rollout: Rollout) -> None:
        """Score and optimise."""
        scores = torch.tensor([float(len(r)) for r in rollout.responses])
        with self.autocast():
            experience = build_experience(
                rollout,
                scores,
                policy=self.policy,
                reference=self.reference,
                critic=self.critic,
                estimate=partial(gae, gamma=1.0, lam=0.95),
                kl_coef=0.1,
                whiten_advantages=True,
                pad_id=self.pad_id,
                batch_tokens=self.shape.micro_tokens,
            )
        self.trainer.optimise(experience, torch.Generator().manual_seed(4))

    def supervise(self, texts: Sequence[list[int]]) -> None:
        """One optimizer step on whole texts."""
        self.optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(text) - 1 for text in texts)
        rows = max(1, self.shape.micro_tokens // self.shape.block)
        for start in range(0, len(texts), rows):
            part = texts[start : start + rows]
            batch = token_batch([t[:1] for t in part], [t[1:] for t in part], self.pad_id)
            with self.autocast():
                found = self.policy.logprobs(batch.to(self.policy.device))[0]
            (-found.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.policy.model.parameters(), 1.0)
        self.optimizer.step()


class Plain:
    """The plain way: bf16 weights to generate with, fp32 weights under autocast to train.

    Args:
        shape: Model and work.
        device: Where.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.pad_id = shape.vocabulary - 1
        model = shape.model(device)
        self.fast = copy.deepcopy(model).to(torch.bfloat16)
        self.fast.generation_config.eos_token_id = shape.vocabulary - 2
        reference = copy.deepcopy(model).requires_grad_(requires_grad=False)
        head = torch.nn.Linear(shape.width, 1, device=device)
        parameters = [*model.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-6)
        longest = shape.prompt[1] + shape.response[1]
        micro = max(1, shape.micro_tokens // longest)
        autocast = autocast_of("bf16", device)
        self.update = PaddedUpdate(model, reference, head, optimizer, autocast, micro)

    def roll_out(self, work: Work) -> list[list[int]]:
        """Responses."""
        return generate(self.fast, work.prompts, work.limits, self.pad_id)

    def responses(self, rollout: list[list[int]]) -> list[list[int]]:
        """Its tokens."""
        return rollout

    def learn(self, work: Work, responses: Sequence[Sequence[int]]) -> None:
        """Score and optimise; the weights to generate with follow."""
        batch = token_batch(work.prompts, responses, self.pad_id).to(self.device)
        counts = batch.predicts[:, :-1]
        old, held, values = self.update.known(batch.ids, batch.mask)
        gains = torch.where(counts, 1.0 - 0.1 * (old - held) - values, 0.0)
        for _ in range(EPOCHS):
            self.update.step(batch.ids, batch.mask, counts, old, values, gains)
        for fast, slow in zip(self.fast.parameters(), self.update.model.parameters(), strict=True):
            fast.data.copy_(slow.data)

    def supervise(self, texts: Sequence[list[int]]) -> None:
        """One optimizer step on whole texts."""
        update = self.update
        update.optimizer.zero_grad(set_to_none=True)
        rows = max(1, self.shape.micro_tokens // self.shape.block)
        ids = torch.tensor(texts, device=self.device)
        for part in ids.split(rows):
            with update.autocast():
                loss = update.model(input_ids=part, labels=part).loss
            (loss * len(part) / len(ids)).backward()
        torch.nn.utils.clip_grad_norm_(update.model.parameters(), 1.0)
        update.optimizer.step()


def measurements(shape: Shape, device: torch.device, flops: float) -> Iterator[Row]:
    """Rows of the table for one shape.

    Args:
        shape: Model and work.
        device: Where.
        flops: Operations per second of a large bf16 product, what utilisation is a share of.
    """
    for name, kind in (("suasion", Ours), ("plain", Plain)):
        for row in _side(kind(shape, device), shape, device):
            if "operations" in row:
                row["utilisation"] = row.pop("operations") / flops
            yield {"shape": shape.name, "side": name, **row}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _side(side: Any, shape: Shape, device: torch.device) -> Iterator[Row]:
    """One side's rows; `operations` are per second."""
    work, sizes = Work.of(shape), shape.sizes
    start_memory(device)
    rollout = side.roll_out(work)
    responses = side.responses(rollout)
    tokens = sum(map(len, responses))
    spent = seconds_of(partial(side.roll_out, work), device, 2)
    yield {
        "work": "rollout",
        "seconds": spent,
        "tokens_per_second": tokens / spent,
        "peak_bytes": peak(device),
    }
    start_memory(device)
    learnt = seconds_of(partial(side.learn, work, rollout), device, 2)
    whole = [len(p) + len(r) for p, r in zip(work.prompts, responses, strict=True)]
    yield {
        "work": "PPO iteration",
        "seconds": spent + learnt,
        "tokens_per_second": tokens / (spent + learnt),
        "operations": 3 * EPOCHS * (sizes.trunk(whole) + sizes.head(tokens)) / learnt,
        "peak_bytes": peak(device),
    }
    start_memory(device)
    texts = texts_of(shape)
    taken = seconds_of(partial(side.supervise, texts), device, 3)
    count = sum(map(len, texts))
    yield {
        "work": "supervised step",
        "seconds": taken,
        "tokens_per_second": count / taken,
        "operations": 3 * (sizes.trunk(list(map(len, texts))) + sizes.head(count)) / taken,
        "peak_bytes": peak(device),
    }


def texts_of(shape: Shape) -> list[list[int]]:
    """Random texts of a supervised step."""
    generator = torch.Generator().manual_seed(5)
    size = (shape.sequences, shape.block)
    found: list[list[int]] = torch.randint(
        0, shape.vocabulary - 2, size, generator=generator
    ).tolist()
    return found


def start_memory(device: torch.device) -> None:
    """Forget the peak so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> int:
    """Most bytes allocated since; 0 on a processor."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
