"""What a plan says. Sizes are in bytes, times in seconds, lengths in tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

PROCESS = "process"
WEIGHTS = "weights"
ADAPTERS = "adapters"
PARTS = (
    WEIGHTS,
    ADAPTERS,
    "optimizer",
    "gradients",
    "kv_cache",
    "logits",
    "casts",
    "activations",
    PROCESS,
)
"""What the bytes of a phase are divided into: they add up to its total."""


@dataclass(frozen=True)
class RolePlan:
    """What one role holds as long as the stage runs."""

    name: str
    """policy, reference, critic, reward, or a model of the evaluation."""
    weights: dict[str, int]
    """Bytes by how they are held: fp32, bf16, int8, nf4."""
    adapters: int = 0
    """Low-rank weights."""
    gradients: int = 0
    """Gradients of what trains."""
    optimizer: int = 0
    """Optimizer states of what trains."""
    parameters: int = 0
    """Weights and adapters, as numbers rather than bytes."""
    trainable: int = 0
    """Of these the ones that train."""
    note: str = ""
    """What it shares with whom."""


@dataclass(frozen=True)
class PhasePlan:
    """The moment of a phase at which most is held."""

    name: str
    """perplexity, update, rollout, scoring, ..."""
    parts: dict[str, int]
    """Bytes by `PARTS`."""
    on_host: bool = False
    """Whether this is the processor's memory although a GPU computes."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What a stage computes."""

    operations: float
    """Floating-point operations of one step."""
    tokens: int
    """Tokens of one step."""
    steps: int | None
    """Steps in all; None where only the data knows."""
    streamed: float = 0.0
    """Bytes of weights and cache read token by token in the step's decoding."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    name: str
    """pretrain, sft, reward, ppo, evaluate."""
    roles: tuple[RolePlan, ...]
    """Who is in memory."""
    phases: tuple[PhasePlan, ...]
    """What happens."""
    work: Work | None = None
    """What it costs in time."""
    assumed: tuple[str, ...] = ()
    """What was taken for granted, such as lengths that only the data knows."""

    @property
    def peak(self) -> PhasePlan:
        """The phase that needs most on the device."""
        return max((p for p in self.phases if not p.on_host), key=lambda phase: phase.total)


@dataclass(frozen=True)
class Room:
    """How far one option could go on the card."""

    key: str
    """Recipe key."""
    now: int
    """Its value."""
    largest: int
    """Largest value that fits, everything else as it is; 0 where none does."""


@dataclass(frozen=True)
class Change:
    """One step of what to change, in the order in which to try."""

    key: str
    """Recipe key."""
    value: str
    """What to set it to."""
    peak: int
    """Peak of the stage then, with the changes before it."""
    effect: str
    """What it does to the result."""


@dataclass(frozen=True)
class Verdict:
    """A stage against a card."""

    fits: bool
    """Whether its peak is within the card's memory."""
    rooms: tuple[Room, ...] = ()
    """Largest batch and length."""
    changes: tuple[Change, ...] = ()
    """What to change, where it does not fit."""
    seconds: float | None = None
    """Of the whole stage, or of a step where the number of steps is not known."""


@dataclass(frozen=True)
class Plan:
    """All stages of a recipe against a card."""

    recipe: str
    """Its name."""
    card: str
    """Name of the card."""
    memory: int
    """Its bytes."""
    flops: float
    """Operations per second that the times are made with."""
    flops_from: str
    """Where that figure comes from."""
    stages: tuple[StagePlan, ...]
    """In their order."""
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    """By stage."""

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(verdict.fits for verdict in self.verdicts.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values with the totals, for JSON."""
        values = asdict(self)
        values["fits"] = self.fits
        for stage, plain in zip(self.stages, values["stages"], strict=True):
            plain["peak"] = {"phase": stage.peak.name, "bytes": stage.peak.total}
            for phase, row in zip(stage.phases, plain["phases"], strict=True):
                row["total"] = phase.total
            plain["verdict"] = values["verdicts"][stage.name]
        del values["verdicts"]
        return values
