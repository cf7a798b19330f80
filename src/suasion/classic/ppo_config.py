"""The one flat configuration of the classic PPO trainer.

Names and defaults are those of huggingface/trl@v0.11.4 trl/trainer/ppo_config.py, so that scripts
and `HfArgumentParser` keep working. It is written to by old scripts, hence neither nested nor
frozen like our own configurations; the trainer checks it once more when it is built.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from suasion.classic.errors import ArgumentError

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "all")


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`.

    Raises:
        ArgumentError: a value is outside its range, or batch sizes do not divide.
    """

    exp_name: str = "ppo"
    """Name of the experiment, for trackers."""
    seed: int = 0
    """Of data order, mini-batches and sampling."""
    log_with: str | None = None
    """Tracker, one of `TRACKERS`; None for none."""
    task_name: str | None = None
    """Recorded only."""
    model_name: str | None = "gpt2"
    """Recorded; scripts load the model they name here."""
    query_dataset: str | None = "imdb"
    """Recorded; scripts load the data they name here."""
    reward_model: str | None = "sentiment-analysis:lvwerra/distilbert-imdb"
    """Recorded; scripts load the classifier they name here."""
    remove_unused_columns: bool = True
    """Drop dataset columns that neither the model nor `log_stats` knows."""
    tracker_kwargs: dict[str, Any] = field(default_factory=dict)
    """For the tracker's own start."""
    accelerator_kwargs: dict[str, Any] = field(default_factory=dict)
    """For `accelerate.Accelerator`, mixed precision for one."""
    project_kwargs: dict[str, Any] = field(default_factory=dict)
    """For `accelerate.utils.ProjectConfiguration`; TensorBoard needs `logging_dir`."""
    tracker_project_name: str = "trl"
    """Project under which the tracker files the run."""
    push_to_hub_if_best_kwargs: dict[str, Any] = field(default_factory=dict)
    """For `push_to_hub`; with `compare_steps`, each best mean score is pushed."""
    steps: int = 20000
    """Recorded; the length of the loop is the script's."""
    learning_rate: float = 1.41e-5
    """Of the Adam that is built where no optimizer is given."""
    adap_kl_ctrl: bool = True
    """Adapt the KL coefficient towards `target`."""
    init_kl_coef: float = 0.2
    """KL coefficient at the beginning."""
    kl_penalty: Literal["kl", "abs", "mse", "full"] = "kl"
    """Penalty per token; only "kl" has the KL-regularised optimum (suasion.functional.kl)."""
    target: float = 6.0
    """KL to settle at, nats per response."""
    horizon: float = 10000.0
    """Responses over which a full error changes the coefficient about e-fold."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """Mixing of generalised advantage estimation."""
    cliprange: float = 0.2
    """Clip range of the probability ratio."""
    cliprange_value: float = 0.2
    """Clip range of the values."""
    vf_coef: float = 0.1
    """Weight of the value loss."""
    batch_size: int = 128
    """Responses per `step`, of one process."""
    forward_batch_size: int | None = None
    """Old name of `mini_batch_size`."""
    mini_batch_size: int = 128
    """Responses per forward and backward pass."""
    gradient_accumulation_steps: int = 1
    """Mini-batches per optimizer step."""
    world_size: int | None = None
    """Processes; the trainer knows and sets it."""
    ppo_epochs: int = 4
    """Times over each batch."""
    max_grad_norm: float | None = None
    """Gradients are scaled down to this norm; None leaves them."""
    optimize_cuda_cache: bool | None = None
    """Old name of `optimize_device_cache`."""
    optimize_device_cache: bool = False
    """Empty the device's cache after each `step`: slower, less memory."""
    early_stopping: bool = False
    """End a `step` when the policy has moved too far, see `target_kl`."""
    target_kl: float = 1.0
    """Early stopping is at 1.5 times this mean log-ratio, nats per token."""
    compare_steps: int = 1
    """Compare the mean score with the best one every so many steps."""
    ratio_threshold: float = 10.0
    """A mini-batch whose mean probability ratio is above this is left out."""
    use_score_scaling: bool = False
    """Divide scores by their running standard deviation."""
    use_score_norm: bool = False
    """Take their running mean off first; needs `use_score_scaling`."""
    score_clip: float | None = None
    """Hold scores inside plus and minus this."""
    whiten_rewards: bool = False
    """Whiten rewards per token, keeping their mean, before advantages are computed."""

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warnings.warn(
                "PPOConfig.forward_batch_size is now called mini_batch_size",
                FutureWarning,
                stacklevel=3,
            )
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            warnings.warn(
                "PPOConfig.optimize_cuda_cache is now called optimize_device_cache",
                FutureWarning,
                stacklevel=3,
            )
            self.optimize_device_cache = self.optimize_cuda_cache
        self.check()

    @property
    def backward_batch_size(self) -> int:
        """Responses per optimizer step."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """All fields, for trackers."""
        return asdict(self)

    def check(self) -> None:
        """Refuse values no run can be made with.

        Raises:
            ArgumentError: names the field, its value and what it must be.
        """
        for name in ("batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs"):
            self._require(name, whole=True)
        for name in ("learning_rate", "target", "horizon", "cliprange", "ratio_threshold"):
            self._require(name)
        for name in ("cliprange_value", "target_kl", "compare_steps"):
            self._require(name)
        for name in ("max_grad_norm", "score_clip"):
            if getattr(self, name) is not None:
                self._require(name)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ArgumentError(f"PPOConfig.{name} is {getattr(self, name)}, not in 0..1")
        for name in ("init_kl_coef", "vf_coef"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ArgumentError(f"PPOConfig.{name} is {getattr(self, name)}, not 0 or more")
        self._check_choices()
        if self.batch_size % self.backward_batch_size:
            raise ArgumentError(
                f"PPOConfig.batch_size {self.batch_size} is not a multiple of mini_batch_size "
                f"{self.mini_batch_size} * gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} = {self.backward_batch_size}",
                "set mini_batch_size (and gradient_accumulation_steps) so that they divide it",
            )

    def _check_choices(self) -> None:
        if self.kl_penalty not in ("kl", "abs", "mse", "full"):
            raise ArgumentError(
                f"PPOConfig.kl_penalty is {self.kl_penalty!r}", "choose kl, abs, mse or full"
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise ArgumentError(
                "PPOConfig.use_score_norm does nothing without use_score_scaling",
                "set use_score_scaling=True as well",
            )
        if self.log_with is not None and self.log_with not in TRACKERS:
            raise ArgumentError(
                f"PPOConfig.log_with is {self.log_with!r}", f"choose one of {', '.join(TRACKERS)}"
            )

    def _require(self, name: str, *, whole: bool = False) -> None:
        """Refuse a number that is not positive."""
        value = getattr(self, name)
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not fits or not value > 0:
            kind = "a whole number above 0" if whole else "a number above 0"
            raise ArgumentError(f"PPOConfig.{name} is {value!r}, not {kind}")
