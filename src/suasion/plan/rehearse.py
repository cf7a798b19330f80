"""One stage gone through once, on models that are shapes: which phase holds how much.

What runs here is the code that runs later: the policy's update is `PolicyTrainer.optimise`,
experience is `build_experience`, scores are `RewardModel.score_tokens`. Only the models are hollow.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from suasion.config.schema import LoraConfig
from suasion.plan.hollow import furnish, held_by, hollow_model, shallow, tensors_of
from suasion.plan.ledger import ACTIVATIONS, GRADIENTS, OPTIMIZER, Ledger, without_contents
from suasion.plan.records import ADAPTERS, PARTS, PROCESS, WEIGHTS, PhasePlan, RolePlan
from suasion.plan.states import state_tensors

Optimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups -> optimizer."""


class Workshop:
    """Makes hollow models, each once, in one world of empty tensors."""

    def __init__(self) -> None:
        self.world = without_contents()
        self._made: dict[tuple[Any, ...], Any] = {}

    def model(
        self, role: str, config: PretrainedConfig, *, again: bool = False, **options: Any
    ) -> Any:
        """The model of a role.

        Args:
            role: Models of two roles are two models.
            config: The architecture.
            again: Make it anew, where what a rehearsal did to it would stay.
            options: Of `hollow_model`.
        """
        key = (role, config.to_json_string(), *sorted(options.items()))
        if again or key not in self._made:
            made = hollow_model(config, **options)
            with self.world:
                made = furnish(made)
            if again:
                return made
            self._made[key] = made
        model = self._made[key]
        for parameter in model.parameters():
            parameter.grad = None
        return model


class Rehearsal:
    """Keeps the books of a stage while its phases run.

    Args:
        world: Where its models are from.
        vocabulary: Tells logits from other activations.
        process: Bytes of interpreter, libraries and context.
    """

    def __init__(self, world: Any, vocabulary: int, process: int) -> None:
        self._world = world
        self._process = process
        self._roles: dict[str, RolePlan] = {}
        self._trained: dict[str, list[Tensor]] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._phases: list[PhasePlan] = []
        self.ledger = Ledger(vocabulary=vocabulary)

    def taken(self) -> tuple[PhasePlan, ...]:
        """What happened since the last call."""
        phases, self._phases = tuple(self._phases), []
        return phases

    @property
    def roles(self) -> tuple[RolePlan, ...]:
        """Who took part."""
        return tuple(self._roles.values())

    @contextmanager
    def inside(self) -> Iterator[Ledger]:
        """Book everything in here."""
        with warnings.catch_warnings():
            # Making an empty tensor of a small real one asks that one for its gradient, and a copy
            # of an empty one asks where its contents are.
            for message in ("The .grad attribute of a Tensor that is not", "Accessing the data po"):
                warnings.filterwarnings("ignore", message=message)
            with self._world, self.ledger:
                yield self.ledger

    @contextmanager
    def trying(self, model: Any) -> Iterator[None]:
        """Where roles are built: they try out what their model can do, and two layers tell."""
        with self.inside(), shallow(model):
            yield

    def add(self, name: str, model: nn.Module, note: str = "") -> None:
        """Count a role's weights; those that a role before it holds already are not its own."""
        found = held_by(model, self.ledger.know(tensors_of(model)))
        self._roles[name] = RolePlan(
            name, found.weights, found.adapters, parameters=found.parameters, note=note
        )

    def train(
        self, optimizer: Optimizer, groups: dict[str, tuple[list[nn.Parameter], float]]
    ) -> None:
        """Make the optimizer over each role's parameters, and its states."""
        with self.inside():
            made = optimizer([{"params": ps, "lr": rate} for ps, rate in groups.values()])
            everything = [p for ps, _ in groups.values() for p in ps]
            for parameter in everything:
                parameter.grad = torch.empty_like(parameter)
            made.step()
            made.zero_grad(set_to_none=True)
            self.ledger.label(state_tensors(made, everything), OPTIMIZER)
        self._optimizer = made
        for name, (parameters, _) in groups.items():
            role = self._roles[name]
            self._trained[name] = list(parameters)
            self._roles[name] = replace(
                role,
                gradients=sum(p.numel() * p.element_size() for p in parameters),
                optimizer=sum(
                    t.numel() * t.element_size() for t in state_tensors(made, parameters)
                ),
                trainable=sum(p.numel() for p in parameters),
            )

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The one that `train` made."""
        assert self._optimizer is not None
        return self._optimizer

    def phase(self, name: str, work: Callable[[], object], roles: Iterable[str] = ()) -> None:
        """Run a phase and note its peak.

        Args:
            name: Of the phase.
            work: What it does.
            roles: Those whose weights are on the device; none named: all so far.
        """
        with self.inside():
            self.ledger.start()
            work()
            self.ledger.label((p.grad for ps in self._trained.values() for p in ps), GRADIENTS)
        self.note(name, self.ledger.peak().parts, roles)

    def note(
        self, name: str, parts: dict[str, int], roles: Iterable[str] = (), *, on_host: bool = False
    ) -> None:
        """Enter a phase whose bytes beside weights and process are known."""
        held = [self._roles[role] for role in roles] or list(self._roles.values())
        whole = dict.fromkeys(PARTS, 0) | parts
        whole[WEIGHTS] += sum(sum(role.weights.values()) for role in held)
        whole[ADAPTERS] += sum(role.adapters for role in held)
        whole[PROCESS] = self._process
        self._phases.append(PhasePlan(name, whole, on_host))

    def forget_gradients(self) -> None:
        """What `Trainer` does after each step."""
        self.optimizer.zero_grad(set_to_none=True)


def trainer_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The one that the transformers Trainer makes."""
    return torch.optim.AdamW(groups, fused=True)


def merge_parts(stage: Rehearsal, model: nn.Module, lora: LoraConfig, *, on_host: bool) -> None:
    """Note what merging an adapter needs: its base unpacked, in the memory of the processor.

    Args:
        stage: Keeps the books.
        model: With its adapter.
        lora: Says in which type it is merged.
        on_host: Whether that is another memory than the one planned for.
    """
    held = held_by(model, tensors_of(model))
    dense = (4 if lora.merge_dtype == "fp32" else 2) * held.parameters
    already = sum(held.weights.values())
    largest = max(4 * p.numel() for p in model.parameters())
    # Layer by layer, each is let go in its old form once it is there in the new one.
    stage.note("merge", {ACTIVATIONS: max(0, dense - already) + largest}, on_host=on_host)
