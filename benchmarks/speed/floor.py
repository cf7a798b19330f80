"""The least time that the arithmetic of an iteration takes on a machine of given rates.

Counted are the matrix products of the model on the tokens that are really there: no padding, no
position whose logits nobody asked for, nothing computed twice. A product of [n, k] and [k, m] is
2 n k m operations; a backward pass costs twice a forward pass, once where the weights are frozen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.speed.task import SHAPES, Task

ADAM_BYTES = 28
"""Moved per float32 weight and step: weight, gradient and two moments read, all but one written."""


@dataclass(frozen=True)
class Model:
    """Sizes that decide the operations."""

    layers: int
    width: int
    vocabulary: int
    weights: int
    """Of the trunk's linear layers."""

    @classmethod
    def of(cls, task: Task) -> Model:
        """The task's."""
        layers, width, _, _ = SHAPES[task.shape]
        feed_forward = 2 * 4 * width if task.family == "gpt2" else 3 * (width * 8 // 3)
        return cls(layers, width, task.vocabulary_size, layers * width * (4 * width + feed_forward))

    def trunk(self, lengths: Sequence[float]) -> float:
        """Operations of a forward pass over whole sequences; attention is causal."""
        linear = 2 * self.weights * sum(lengths)
        return linear + sum(2 * self.layers * self.width * n * n for n in lengths)

    def head(self, tokens: float) -> float:
        """Operations of the output layer at this many positions."""
        return 2 * self.width * self.vocabulary * tokens

    @property
    def parameters(self) -> int:
        """Linear layers and the embedding, which is the head too."""
        return self.weights + self.width * self.vocabulary


def floor_seconds(
    task: Task,
    prompts: Sequence[int],
    responses: Sequence[float],
    *,
    flops: float,
    bandwidth: float,
    weight_bytes: int,
) -> dict[str, float]:
    """Least seconds of an iteration by phase.

    Args:
        task: What is done.
        prompts: Tokens of each prompt; empty for supervised and reward steps.
        responses: Tokens of each response, or of each sequence trained on.
        flops: Operations per second.
        bandwidth: Bytes per second.
        weight_bytes: Of a weight, as decoding reads it.
    """
    model = Model.of(task)
    if task.work in {"sft", "reward"}:
        heads = model.head(sum(responses)) if task.work == "sft" else 0.0
        passes = 2 if task.lora else 3
        compute = passes * (model.trunk(responses) + heads) / flops
        return {"update": compute + _adam(task, model, 1, bandwidth)}
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    rollout = model.trunk(prompts) / flops
    step_weights = weight_bytes * model.parameters / bandwidth
    for place in range(int(max(responses))):
        live = [p + place for p, r in zip(prompts, responses, strict=True) if r > place]
        work = len(live) * 2 * model.parameters + 4 * model.layers * model.width * sum(live)
        rollout += max(work / flops, step_weights)
    found = {"rollout": rollout}
    if task.work == "rollout":
        return found
    forward = model.trunk(whole) + model.head(sum(responses))
    separate = task.critic == "separate"
    scoring = forward + model.trunk(whole) * (2 if separate else 1)
    trained = forward + (model.trunk(whole) if separate else 0.0)
    passes = 2 if task.lora else 3
    return {
        **found,
        "scoring": scoring / flops,
        "update": passes * task.epochs * trained / flops
        + _adam(task, model, task.epochs, bandwidth),
    }


def floor_of(
    task: Task, reading: dict[str, Any], rates: Mapping[str, float], mode: str
) -> dict[str, float]:
    """Least seconds by phase of what a reading did, at the rates of `mode` (fp32 fast or bf16)."""
    responses = reading["responses"]
    if task.work == "reward":  # told as means; how long this step's were, the tokens say
        scale = reading["tokens"] / sum(responses)
        responses = [scale * length for length in responses]
    return floor_seconds(
        task,
        reading["prompts"],
        responses,
        flops=rates[f"{mode} flops"],
        bandwidth=rates["copy_bytes_per_second"],
        weight_bytes=2 if mode == "bf16" else 4,
    )


def _adam(task: Task, model: Model, steps: int, bandwidth: float) -> float:
    """Seconds of the optimizer's memory traffic; adapters have next to no weights."""
    if task.lora:
        return 0.0
    models = 2 if task.work == "ppo" and task.critic == "separate" else 1
    return steps * models * ADAM_BYTES * model.parameters / bandwidth
