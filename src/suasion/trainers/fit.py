"""The transformers Trainer with our habits: metrics as JSON lines, resume, one kind of progress."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from suasion.config.schema import TrainingConfig
from suasion.core.errors import ConfigError, TrainingError
from suasion.core.files import (
    append_json_line,
    keep_json_lines,
    read_json,
    read_json_lines,
    write_json,
)
from suasion.core.progress import Meter
from suasion.core.ranks import ALONE, Ranks, checksum
from suasion.core.seeding import seed_of
from suasion.models.arithmetic import arithmetic_for, float32_products
from suasion.models.load import device_for_training
from suasion.models.lowrank import adapters_at_once
from suasion.trainers.ordering import Ordered, length_grouped

COMPLETE = "complete"
"""Written into a checkpoint last; one without it was cut off and is deleted. It holds the sums of
the losses so far, which the library forgets, so that a resumed run reports the same figures."""

_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}

Loss = Callable[[dict[str, Any]], torch.Tensor]
"""Batch -> its mean loss."""


def fit(
    model: Any,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    loss: Loss,
    config: TrainingConfig,
    *,
    folder: Path,
    seed: int,
    console: Console,
    title: str,
    lengths: Sequence[int] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Train `model` in place, continuing from the newest whole checkpoint in `folder`.

    Args:
        model: A transformers or peft model.
        dataset: Training rows.
        collate: Rows to a batch.
        loss: Loss of a batch, computed with `model`.
        config: Learning rate and the rest.
        folder: The stage's folder; gets metrics.jsonl, checkpoints/ and tracking/.
        seed: Of data order and dropout.
        console: For progress.
        title: Shown beside the progress.
        lengths: Tokens of each row, to batch rows of similar length; None: rows are of one length.
        ranks: The processes that train together; each has `batch_size` rows at a time.

    Returns:
        Steps, the mean training loss, and the arithmetic.

    Raises:
        ConfigError: the stage was begun by another number of processes.
        TrainingError: the library does not see the processes, or their weights differ.
    """
    checkpoints = folder / "checkpoints"
    newest = ranks.share(partial(_newest_whole, checkpoints))
    metrics = folder / "metrics.jsonl"
    if ranks.first and metrics.is_file():
        step = int(newest.name.rpartition("-")[2]) if newest else 0
        keep_json_lines(metrics, [row for row in read_json_lines(metrics) if row["step"] <= step])
    _quiet()
    arithmetic = arithmetic_for(
        config.precision,
        width=model.get_input_embeddings().weight.shape[1],
        device=device_for_training(),
        folder=folder,
        ranks=ranks,
    )
    if lengths is not None:
        together = config.batch_size * ranks.world
        per_step = together * config.accumulate
        passes = config.epochs
        if config.max_steps is not None:
            passes = config.max_steps * per_step / len(lengths)
        dataset = Ordered(dataset, length_grouped(lengths, passes, together, seed))
    trainer = _Trainer(
        model=model,
        args=_arguments(
            config,
            checkpoints,
            seed,
            ordered=lengths is not None,
            half=arithmetic.dtype == "bfloat16",
        ),
        train_dataset=dataset,
        data_collator=collate,
    )
    trainer.ranks = ranks
    _check_processes(trainer, model, ranks)
    if newest:
        trainer.losses = _losses_in(newest, ranks)
    trainer.remove_callback(PrinterCallback)
    if "tensorboard" in config.track and ranks.first:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tracking"))
        trainer.add_callback(TensorBoardCallback(writer))
    if ranks.first:
        trainer.add_callback(_Journal(metrics, trainer.losses, console, title))
    trainer.add_callback(_Sealer(trainer.losses, ranks))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        # Where the base is itself an adapter's folder; only peft's own checkpoints look for it.
        warnings.filterwarnings("ignore", message="Could not find a config file")
        try:
            with (
                _calls_give(model, loss),
                adapters_at_once(model),
                float32_products(arithmetic.training),
            ):
                outcome = trainer.train(resume_from_checkpoint=str(newest) if newest else None)
                # The library leaves its own precision in `forward`; what is next has another.
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        finally:
            if ranks.first:
                # A checkpoint that a full disk cut off takes up the rest.
                _newest_whole(checkpoints)
    steps = float(outcome.global_step)
    kept = {"steps": steps, "loss": trainer.losses.total / steps}
    return {**kept, "arithmetic": arithmetic.brief}


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
    """A Trainer of a model whose calls give losses, and which keeps their sum."""

    ranks: Ranks = ALONE

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.losses = _Losses()

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Forward and backward; the losses of a step's passes add up to the step's."""
        loss = super().training_step(*arguments, **named)
        # Each process's loss is that of its rows, in a unit in which their mean is the step's.
        self.losses.total += float(self.ranks.sum(loss)) / self.ranks.world
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002 (the library's signature)
        num_items_in_batch: Any = None,
    ) -> Any:
        """Mean loss of a batch; see `_calls_give`."""
        self.loss_is_scaled_for_ga = False
        return model(**inputs)


@contextmanager
def _calls_give(model: Any, loss: Loss) -> Iterator[None]:
    """While it lasts, `model(**batch)` is the loss of a batch.

    So a loss may use the model's parts as it likes, and yet passes through what wraps the model:
    several processes that add up gradients, and reduced precision.
    """
    model.forward = lambda **batch: loss(batch)
    try:
        yield
    finally:
        del model.forward


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

    def __init__(self, losses: _Losses, ranks: Ranks) -> None:
        self._losses = losses
        self._ranks = ranks

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._ranks.barrier()  # each process writes its random state into it
        if self._ranks.first:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            seal = {**asdict(self._losses), "processes": self._ranks.world}
            write_json(folder / COMPLETE, seal)


def _losses_in(checkpoint: Path, ranks: Ranks) -> _Losses:
    """The sums a checkpoint goes on from."""
    seal = read_json(checkpoint / COMPLETE)
    begun_by = seal.pop("processes", 1)
    if begun_by != ranks.world:
        raise ConfigError(
            f"{checkpoint} was written by {begun_by} processes, and these are {ranks.world}: "
            "a step would be of another size",
            f"go on with {begun_by}, or delete {checkpoint.parent.parent} to begin anew",
        )
    return _Losses(**seal)


def _check_processes(trainer: Trainer, model: Any, ranks: Ranks) -> None:
    """The library trains in as many processes as were started, from the same weights."""
    if trainer.args.world_size != ranks.world:
        raise TrainingError(
            f"{ranks.world} processes were started, the transformers Trainer sees "
            f"{trainer.args.world_size}: each would train by itself",
            "start with torchrun --nproc_per_node N -m suasion.cli.main ...",
        )
    if ranks.world > 1:
        ranks.agree(
            "the checksum of the model's weights",
            checksum(model.parameters()),
            "give every process the same model folder and versions",
        )


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
    config: TrainingConfig, checkpoints: Path, seed: int, *, ordered: bool, half: bool
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
        bf16=half,
        use_cpu=device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_steps=config.save_every,
        save_total_limit=2,
        seed=number,
        data_seed=number,
        report_to=[name for name in config.track if name != "tensorboard"] or "none",
        disable_tqdm=True,
        log_level_replica="error",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def _quiet() -> None:
    """The libraries announce what we say ourselves."""
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
