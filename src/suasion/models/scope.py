"""Which adapter of a shared base is active: one object decides, and refuses the wrong order.

Several adapters on one base are several functions over the same modules. Two things go wrong
without a word when one is switched for another between a forward pass and its backward pass: peft
takes `requires_grad` from the one that leaves, so that its gradients are zero; and with gradient
checkpointing the backward pass computes the forward pass again, under whichever adapter is active
by then, so that its gradients are another function's.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from suasion.core.errors import ModelError, TrainingError

_SWITCHED = (BaseTunerLayer, ModulesToSaveWrapper)
BASE = "the base alone"
"""What no adapter at all is called in messages."""


class AdapterScope:
    """Owns which adapter of a peft model is active.

    At rest it is the one given here. `use` switches for the length of a block:

        with scope.use("critic"):
            loss(values(batch)).backward()
        with torch.no_grad(), scope.use(None):
            logprobs = reference(batch)

    An output of the trunk that wants gradients opens a graph of the active adapter, which closes
    when its backward pass runs or when nothing holds the output any more. While one is open, its
    adapter must be active whenever gradients are recorded or flow; others may run without gradient
    and leave no trace. `requires_grad` is set here alone and does not depend on what is active.

    Args:
        model: A peft model. Adapters put on it later are told by `add`.
        resting: The adapter that is active outside of any block; its weights learn.

    Raises:
        ModelError: the model has no such adapter.
    """

    def __init__(self, model: Any, resting: str) -> None:
        self.model = model
        self._learns: dict[str, bool] = {}
        self._open: weakref.WeakSet[_Graph] = weakref.WeakSet()
        self.resting = resting
        self.active: str | None = resting
        self.add(resting, learns=True)
        model.get_base_model().base_model.register_forward_hook(self._after_trunk)

    def add(self, name: str, *, learns: bool) -> None:
        """Take an adapter that is on the model into account.

        Args:
            name: Of the adapter.
            learns: Whether its weights are to get gradients.

        Raises:
            ModelError: it is not on the model.
        """
        if name not in self.model.peft_config:
            raise ModelError(
                f"there is no adapter {name!r} on this model, only {', '.join(self.names)}"
            )
        self._learns[name] = learns
        self._layers = [m for m in self.model.modules() if isinstance(m, _SWITCHED)]
        self._wanted = [
            (weight, learns)
            for known, learns in self._learns.items()
            for _, weight in self.parameters(known)
        ]
        self._switch(self.active)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters on the model."""
        return tuple(self.model.peft_config)

    def parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """The weights of one adapter by their names in the model, whatever `requires_grad` says."""
        return [each for each in self.model.named_parameters() if _adapter_of(each[0]) == name]

    def base_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights that no adapter owns, by name."""
        return (each for each in self.model.named_parameters() if _adapter_of(each[0]) is None)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Make an adapter the active one while the block runs; None for the base alone.

        Where gradients are recorded, a block holds a forward pass and all of its backward pass.

        Raises:
            ModelError: there is no such adapter.
            TrainingError: a graph of another adapter is open where the block begins or ends.
        """
        if name is not None and name not in self._learns:
            raise ModelError(f"there is no adapter {name!r}, only {', '.join(self._learns)}")
        before = self.active
        if name == before:
            yield
            return
        if torch.is_grad_enabled():
            self._require_closed(name, "switching to")
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)
        self._require_closed(before, "going back to", among=name)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers:
            at = _reached(layer, name)
            layer.enable_adapters(enabled=at is not None)
            if at is not None:
                layer.set_adapter([at])
        for weight, learns in self._wanted:
            weight.requires_grad_(learns)
        self.active = name

    def _after_trunk(self, _module: nn.Module, _given: Any, output: Any) -> Any:
        """Note the graph that a forward pass opened."""
        self._require_unmoved(self.active, "a forward pass")
        hidden = output.last_hidden_state
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return output
        self._require_closed(self.active, "recording gradients of")
        graph = _Graph(self.active)
        self._open.add(graph)
        output.last_hidden_state = _Seal.apply(hidden, self, graph)
        return output

    def backward_begins(self, graph: _Graph) -> None:
        """Close a graph whose gradients begin to flow.

        Raises:
            TrainingError: another adapter is active than in its forward pass.
        """
        graph.open = False
        self._require_unmoved(graph.adapter, "a backward pass")

    def _require_closed(self, name: str | None, doing: str, among: str | None = None) -> None:
        others = {g.adapter for g in self._open if g.open and g.adapter != name}
        for other in others if among is None else others & {among}:
            _refuse(
                f"{doing} {_called(name)} while a graph of {_called(other)} is open: its gradients "
                "would be lost, or another function's",
                f"run the backward pass of {_called(other)} first, or let go of its output; what "
                "needs no gradient belongs under torch.no_grad()",
            )

    def _require_unmoved(self, name: str | None, doing: str) -> None:
        """Refuse where what peft has active is not `name`, whoever switched."""
        now = next((e for e in self._layers if _active(e) != _reached(e, name)), None)
        if now is not None:
            _refuse(
                f"{doing} of {_called(name)} while {_called(_active(now))} is active",
                "switch adapters by AdapterScope.use alone, with forward and backward pass in one "
                "block",
            )
        if any(weight.requires_grad != learns for weight, learns in self._wanted):
            _refuse(
                f"{doing} of {_called(name)} after someone changed requires_grad of its weights",
                "switch adapters by AdapterScope.use alone: peft's own switch freezes the others",
            )


class _Graph:
    """A forward pass whose backward pass is still to come."""

    def __init__(self, adapter: str | None) -> None:
        self.adapter = adapter
        self.open = True


class _Seal(torch.autograd.Function):
    """The identity; lives as long as the graph in front of it, and is first in its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, scope: AdapterScope, graph: _Graph) -> Tensor:
        """Hand on what comes in."""
        ctx.scope, ctx.graph = scope, graph
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Hand on what comes in, where the right adapter is active."""
        ctx.scope.backward_begins(ctx.graph)
        return grads[0], None, None


def _refuse(what: str, fix: str) -> None:
    raise TrainingError(what, fix)


def _called(name: str | None) -> str:
    return BASE if name is None else f"the adapter {name!r}"


def _active(layer: Any) -> str | None:
    """What peft has active in one layer."""
    return None if layer.disable_adapters else "+".join(layer.active_adapters)


def _reached(layer: Any, name: str | None) -> str | None:
    """What is active in one layer where `name` is: a module replaced by another adapter is off."""
    replaced = isinstance(layer, ModulesToSaveWrapper)
    return None if replaced and name not in layer.modules_to_save else name


def _adapter_of(parameter: str) -> str | None:
    """Adapter that a parameter of a peft model belongs to, read off its name."""
    parts = parameter.split(".")
    for part, following in itertools.pairwise(parts):
        if part.startswith(("lora_", "modules_to_save")):
            return following
    return None
