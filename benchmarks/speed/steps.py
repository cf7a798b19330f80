"""Time between optimizer steps, whoever makes them. Needs torch alone: peers import it too."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.speed.probe import Probe


@contextmanager
def timed_steps(probe: Probe, sequences: Sequence[float], vocabulary: int) -> Iterator[None]:
    """Report each optimizer step in this block as an iteration.

    The first one, with what comes before it, is not reported: the clock starts at its end.

    Args:
        probe: Measures.
        sequences: Tokens of the sequences a step is made on.
        vocabulary: Rows of the embedding whose calls are counted, whoever holds the model.
    """

    def after(*_: Any) -> None:
        if probe.running:
            probe.mark("update")
            probe.stop([], sequences)
        probe.iteration = max(probe.iteration, 1)
        probe.start()

    def seen(module: nn.Module, inputs: Any, _: Any) -> None:
        if isinstance(module, nn.Embedding) and module.num_embeddings == vocabulary:
            probe.count(inputs[0], vocabulary - 1)

    hooks = (register_optimizer_step_post_hook(after), register_module_forward_hook(seen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mean_texts(folder: Path, pairs: int) -> list[float]:
    """Tokens of the texts of this many pairs, each as long as the mean; all end with EOS."""
    lines = (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    words = [
        len(row["query"].split()) + len(row[name].split()) + 1
        for row in rows
        for name in ("chosen", "rejected")
    ]
    return [sum(words) / len(words)] * (2 * pairs)
