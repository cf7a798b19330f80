"""LoRA adapters: put on, merged into the base as it was held, told apart by that base."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model
from peft.tuners.lora import LoraLayer

from suasion.config.schema import LoraConfig
from suasion.core.errors import ConfigError, ModelError
from suasion.core.files import file_hash, read_json
from suasion.models.checkpointing import checkpoint_layers
from suasion.models.frozen import FrozenLinear, as_conv1d, plain_layer, quantised_layer
from suasion.models.quantised import densify, held_as, is_quantised


def add_lora(
    model: Any, config: LoraConfig, *, seed: int = 0, head: bool = False, dropout: bool = True
) -> Any:
    """Put a LoRA adapter on `model`; only the adapter (and a scoring head) then trains.

    Args:
        model: A causal LM, or a classifier if `head`.
        config: Rank and the rest; `targets` empty means every linear layer but the output head.
        seed: Draws the adapter's first weights.
        head: The model has a scoring head, which trains in full and is saved with the adapter.
        dropout: Use the configured dropout; the policy must not.

    Raises:
        ConfigError: no module has one of the names in `targets`, or the rank is above the width.
    """
    width = getattr(model.config.get_text_config(), "hidden_size", config.r)
    if config.r > width:
        raise ConfigError(
            f"lora.r is {config.r}, and the model is {width} wide: its adapter would be larger "
            "than what it adapts",
            "take a rank of 8 to 64, or 0 to train all weights",
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            put_on = get_peft_model(
                model,
                PeftLoraConfig(
                    r=config.r,
                    lora_alpha=config.alpha,  # type: ignore[arg-type]
                    lora_dropout=config.dropout if dropout else 0.0,
                    bias="none",
                    target_modules=list(config.targets) or "all-linear",
                    task_type=TaskType.SEQ_CLS if head else TaskType.CAUSAL_LM,
                ),
            )
    except ValueError as error:
        raise ConfigError(
            f"lora.targets {list(config.targets)}: {str(error).splitlines()[0]}",
            "name modules of this model, or leave targets empty for all linear layers",
        ) from error
    return checkpoint_layers(put_on) if config.checkpointing else put_on


@torch.no_grad()
def merged(model: Any, dtype: torch.dtype = torch.float32, *, held: str = "fp32") -> Any:
    """Merge the active adapter into its base, dequantised if need be; changes `model`.

    Each layer is dequantised and merged in fp32 and only then rounded to `dtype`, one after the
    other. Merging into codes instead, as peft does, rounds the base once more: 1.6e-2 of the logits
    instead of 5e-7.

    Args:
        model: A peft model; nothing of it is left to be used.
        dtype: Of the merged weights.
        held: "int8" or "nf4" quantises each of them again at once, as loading the saved model so
            would: the whole is never in memory in `dtype`.

    Returns:
        The plain model.

    Raises:
        ModelError: a merged weight is not finite.
    """
    # By name: a list of the layers would keep each of them until the last is done.
    for name in [name for name, m in model.named_modules() if isinstance(m, LoraLayer)]:
        layer = model.get_submodule(name)
        frozen = layer.get_base_layer()
        plain = plain_layer(frozen, torch.float32)
        layer.base_layer = plain
        layer.merge()
        if not torch.isfinite(plain.weight).all():
            raise ModelError(
                f"merged, {name} has weights that are not finite",
                "the adapter's training went wrong; take an earlier one",
            )
        plain.weight.data = plain.weight.data.to(dtype)
        new = as_conv1d(plain) if _was_conv1d(frozen) else plain
        if is_quantised(held):
            new = quantised_layer(new, held)
            new.workspace = getattr(frozen, "workspace", None)
        model.set_submodule(name, new)
    rest = model.merge_and_unload(safe_merge=True)  # heads
    return rest if is_quantised(held) else densify(rest, dtype)


def _was_conv1d(layer: Any) -> bool:
    return isinstance(layer, FrozenLinear) and layer.transposed


def base_record(model: Any) -> dict[str, Any]:
    """What an adapter's folder tells of its base: how it was held, and which weights they were.

    An adapter learns to correct the rounded base, so a merge needs the same rounding; and peft only
    knows the base by a path, where other weights may lie one day.

    Returns:
        "held", and "weights": a hash of the base's weight files, None for a name on the Hub.
    """
    config = next(iter(model.peft_config.values()))
    return {
        "held": held_as(model),
        "weights": _weights_hash(Path(str(config.base_model_name_or_path))),
    }


def check_base(folder: Path, base: str) -> str:
    """How the base was held when the adapter in `folder` was trained; "fp32" if it does not tell.

    Raises:
        ModelError: `base` holds other weights than those that the adapter was trained on.
    """
    path = folder / "suasion.json"
    told = read_json(path).get("base", {}) if path.is_file() else {}
    trained_on = told.get("weights")
    if trained_on and Path(base).is_dir() and _weights_hash(Path(base)) != trained_on:
        raise ModelError(
            f"{folder} does not fit its base {base}: it was trained on other weights than those "
            "there now (another model, or one that an adapter was merged into already)",
            "put the old base back, or correct base_model_name_or_path in adapter_config.json",
        )
    return str(told.get("held", "fp32"))


def _weights_hash(folder: Path) -> str | None:
    """Hash of a model folder's weights alone: its configuration may be tidied."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return None
    listed = "\n".join(f"{path.name} {file_hash(path)}" for path in files)
    return hashlib.sha256(listed.encode()).hexdigest()
