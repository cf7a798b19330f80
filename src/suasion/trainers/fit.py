"""The transformers Trainer with our habits: metrics as JSON lines, resume, one kind of progress."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from suasion.config.schema import TrainingConfig
from suasion.core.files import (
    append_json_line,
    keep_json_lines,
    read_json,
    read_json_lines,
    write_json,
)
from suasion.core.progress import Meter
from suasion.core.seeding import seed_of
from suasion.models.load import device_for_training, dtype_for
from suasion.trainers.ordering import Ordered, length_grouped

COMPLETE = "complete"
"""Written into a checkpoint last; one without it was cut off and is deleted. It holds the sums of
the losses so far, which the library forgets, so that a resumed run reports the same figures."""

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

Loss = Callable[[Any, dict[str, Any]], torch.Tensor]
"""(model, batch) -> mean loss of the batch."""


def fit(
    model: Any,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    config: TrainingConfig,
    *,
    folder: Path,
    seed: int,
    console: Console,
    title: str,
    loss: Loss | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, float]:
    """Train `model` in place, continuing from the newest whole checkpoint in `folder`.

    Args:
        model: A transformers or peft model.
        dataset: Training rows.
        collate: Rows to a batch.
        config: Learning rate and the rest.
        folder: The stage's folder; gets metrics.jsonl, checkpoints/ and tracking/.
        seed: Of data order and dropout.
        console: For progress.
        title: Shown beside the progress.
        loss: Loss of a batch; None: the model's own.
        lengths: Tokens of each row, to batch rows of similar length; None: rows are of one length.

    Returns:
        Steps and the mean training loss.
    """
    checkpoints = folder / "checkpoints"
    newest = _newest_whole(checkpoints)
    metrics = folder / "metrics.jsonl"
    if metrics.is_file():
        step = int(newest.name.rpartition("-")[2]) if newest else 0
        keep_json_lines(metrics, [row for row in read_json_lines(metrics) if row["step"] <= step])
    _quiet()
    if lengths is not None:
        per_step = config.batch_size * config.accumulate
        passes = config.epochs
        if config.max_steps is not None:
            passes = config.max_steps * per_step / len(lengths)
        dataset = Ordered(dataset, length_grouped(lengths, passes, config.batch_size, seed))
    trainer = _Trainer(
        model=model,
        args=_arguments(config, checkpoints, seed, ordered=lengths is not None),
        train_dataset=dataset,
        data_collator=collate,
    )
    trainer.own_loss = loss
    if newest:
        trainer.losses = _Losses(**read_json(newest / COMPLETE))
    trainer.remove_callback(PrinterCallback)
    if "tensorboard" in config.track:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tracking"))
        trainer.add_callback(TensorBoardCallback(writer))
    trainer.add_callback(_Journal(metrics, trainer.losses, console, title))
    trainer.add_callback(_Sealer(trainer.losses))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        try:
            outcome = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        finally:
            _newest_whole(checkpoints)  # a checkpoint that a full disk cut off takes up the rest
    steps = float(outcome.global_step)
    return {"steps": steps, "loss": trainer.losses.total / steps}


@dataclass
class _Losses:
    """Training losses, summed over steps."""

    total: float = 0.0
    """Of all steps."""
    logged: float = 0.0
    """Of the steps that metrics.jsonl tells of."""
    logged_step: int = 0
    """The last of these."""

    def mean_since_logged(self, step: int) -> float:
        """Mean of the steps not told of yet, which then are."""
        mean = (self.total - self.logged) / (step - self.logged_step)
        self.logged, self.logged_step = self.total, step
        return mean


class _Trainer(Trainer):
    """A Trainer that may be given another loss, and keeps the sum of its losses."""

    own_loss: Loss | None = None

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses = _Losses()

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Forward and backward; the losses of a step's passes add up to the step's."""
        loss = super().training_step(*arguments, **named)
        self.losses.total += float(loss)
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (the library's signature)
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch."""
        if self.own_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.loss_is_scaled_for_ga = False
        return self.own_loss(model, inputs)


class _Journal(TrainerCallback):
    """Writes metrics.jsonl and moves the progress bar."""

    def __init__(self, path: Path, losses: _Losses, console: Console, title: str) -> None:
        self._path = path
        self._losses = losses
        self._console = console
        self._title = title
        self._meter: Meter | None = None
        self._note = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter = Meter(self._console, self._title, state.max_steps, "step")
        self._meter.__enter__()
        self._meter.start_at(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self._meter is not None
        self._meter.reach(state.global_step, self._note)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        row = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "loss" in row:
            row["loss"] = self._losses.mean_since_logged(state.global_step)
            self._note = f"loss {row['loss']:.3f}"
            append_json_line(self._path, {"step": state.global_step, **row})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter is not None:
            self._meter.__exit__(None, None, None)


class _Sealer(TrainerCallback):
    """Marks a checkpoint as whole once everything of it is written."""

    def __init__(self, losses: _Losses) -> None:
        self._losses = losses

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / COMPLETE, asdict(self._losses))


def _newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint with its seal; those without are deleted."""
    whole = []
    for folder in checkpoints.glob("checkpoint-*"):
        if (folder / COMPLETE).is_file():
            whole.append(folder)
        else:
            shutil.rmtree(folder)
    return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def _arguments(
    config: TrainingConfig, checkpoints: Path, seed: int, *, ordered: bool
) -> TrainingArguments:
    device = device_for_training()
    number = seed_of(seed, "trainer") % 2**31
    return TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        num_train_epochs=1 if ordered else config.epochs,
        train_sampling_strategy="sequential" if ordered else "random",
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=_SCHEDULES[config.schedule],
        warmup_steps=config.warmup,  # below 1: a share of all steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype_for(config.precision, device) is torch.bfloat16,
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=number,
        data_seed=number,
        report_to=[name for name in config.track if name != "tensorboard"] or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def _quiet() -> None:
    """The libraries announce what we say ourselves."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
