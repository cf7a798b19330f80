"""Experiment trackers through accelerate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor

from suasion.classic.errors import ArgumentError
from suasion.classic.ppo_config import PPOConfig
from suasion.classic.ppo_statistics import spread
from suasion.classic.ranks import gathered_rows
from suasion.classic.tools import as_numpy


def make_accelerator(config: PPOConfig) -> Accelerator:
    """The accelerator a configuration asks for.

    Raises:
        ArgumentError: TensorBoard has nowhere to write to.
    """
    kwargs = {"log_with": config.log_with, **config.accelerator_kwargs}
    project = dict(config.project_kwargs)
    folder = project.get("logging_dir") or project.get("project_dir") or kwargs.get("project_dir")
    if kwargs["log_with"] == "tensorboard" and folder is None:
        raise ArgumentError(
            "PPOConfig.log_with is tensorboard, and there is no folder for it to write to",
            'set project_kwargs={"logging_dir": FOLDER}',
        )
    return Accelerator(project_config=ProjectConfiguration(**project), **kwargs)


class Tracking:
    """Hands statistics to the tracker.

    Args:
        accelerator: Knows the tracker.
        config: Recorded with the run.
    """

    def __init__(self, accelerator: Accelerator, config: PPOConfig) -> None:
        self._accelerator = accelerator
        self._device = accelerator.device
        self._kind = config.log_with
        if self._kind is None:
            return
        settings = config.to_dict()
        if self._kind == "tensorboard":  # takes plain values only
            plain = (bool, int, float, str)
            settings = {k: v for k, v in settings.items() if isinstance(v, plain)}
        accelerator.init_trackers(
            config.tracker_project_name, config=settings, init_kwargs=config.tracker_kwargs
        )

    def log(
        self,
        stats: dict[str, Any],
        batch: dict[str, Any],
        rewards: Sequence[Tensor] | Tensor,
        columns: Sequence[str],
        step: int,
    ) -> None:
        """See `PPOTrainer.log_stats`."""
        mine = torch.stack([torch.as_tensor(reward).detach().reshape(()) for reward in rewards])
        found: Tensor = self._accelerator.gather(mine.float().to(self._device)).cpu()
        logs = {
            **stats,
            "env/reward_mean": float(found.mean()),
            "env/reward_std": spread(found),
            "env/reward_dist": as_numpy(found),
        }
        if self._kind == "wandb":
            logs["game_log"] = self._table(batch, found, columns)
        if self._kind == "tensorboard" and self._accelerator.is_main_process:
            self._histograms(logs, step)
        self._accelerator.log(logs, step=step)

    def _histograms(self, logs: dict[str, Any], step: int) -> None:
        """Arrays, which the tracker's own `log` passes over."""
        writer = self._accelerator.get_tracker("tensorboard", unwrap=True)
        for name, value in logs.items():
            if isinstance(value, np.ndarray):
                writer.add_histogram(name, value, global_step=step)

    def _table(self, batch: dict[str, Any], rewards: Tensor, columns: Sequence[str]) -> Any:
        import wandb

        missing = [column for column in columns if column not in batch]
        if missing:
            raise ArgumentError(
                f"log_stats: the batch has no column {', '.join(missing)}",
                f"name columns of the batch ({', '.join(batch)}) in columns_to_log",
            )
        mine = list(zip(*(batch[column] for column in columns), strict=True))
        texts = gathered_rows(self._accelerator, mine)
        rows = [[*row, reward] for row, reward in zip(texts, rewards.tolist(), strict=True)]
        return wandb.Table(columns=[*columns, "reward"], rows=rows)
