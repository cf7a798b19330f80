"""The generate / step / log_stats surface of TRL 0.4.2 to 0.11, as a thin view over the core.

    from suasion.classic import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

in place of `from trl import ...`; what differs, and why, is listed in docs/classic.md.
"""

from suasion.classic.collators import (
    DataCollatorForCompletionOnlyLM,
    RewardDataCollatorWithPadding,
)
from suasion.classic.errors import ArgumentError
from suasion.classic.kl_control import AdaptiveKLController, FixedKLController
from suasion.classic.packing import ConstantLengthDataset
from suasion.classic.ppo_config import PPOConfig
from suasion.classic.ppo_trainer import PPOTrainer
from suasion.classic.reward_trainer import RewardConfig, RewardTrainer, compute_accuracy
from suasion.classic.sft_trainer import SFTTrainer
from suasion.classic.tools import LengthSampler, respond_to_batch, set_seed
from suasion.classic.value_head import (
    AutoModelForCausalLMWithValueHead,
    ValueHead,
    create_reference_model,
)

__all__ = [
    "AdaptiveKLController",
    "ArgumentError",
    "AutoModelForCausalLMWithValueHead",
    "ConstantLengthDataset",
    "DataCollatorForCompletionOnlyLM",
    "FixedKLController",
    "LengthSampler",
    "PPOConfig",
    "PPOTrainer",
    "RewardConfig",
    "RewardDataCollatorWithPadding",
    "RewardTrainer",
    "SFTTrainer",
    "ValueHead",
    "compute_accuracy",
    "create_reference_model",
    "respond_to_batch",
    "set_seed",
]
