"""Several roles on one base: adapters that come from folders, from each other, and go to folders.

Every role is a LoRA adapter on the causal LM; the reward model and the critic have a scalar head of
their own beside it. What is read and written are plain peft folders: a classifier's adapter fits
the trunk of the language model as it is, since both name their modules alike.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from suasion.core.errors import ConfigError, ModelError
from suasion.core.files import atomic_folder, read_json, write_json
from suasion.models.adapters import base_record, check_base
from suasion.models.load import SIDECAR
from suasion.models.quantised import is_quantised

POLICY = "default"
"""The policy's adapter, by the name under which peft writes it to the top of a folder."""
REWARD = "reward"
CRITIC = "critic"
REFERENCE = "reference"
"""A frozen snapshot of a supervised adapter."""
HEADS = ("score", "classifier")
"""What the libraries call a classifier's head."""
_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its folder holds it."""

    folder: Path
    """Where it is."""
    config: PeftLoraConfig
    """Rank, targets and the rest."""
    weights: dict[str, Tensor]
    """Low-rank weights by their names in the folder."""
    head: dict[str, Tensor]
    """Weight and perhaps bias of its scalar head; empty where it is a language model's."""

    @property
    def base(self) -> str:
        """Folder or Hub name of the base it was trained on."""
        return str(self.config.base_model_name_or_path)

    def new_head(self) -> nn.Linear:
        """A layer with the head's weights, in fp32.

        Raises:
            ModelError: it has no head, or one with more than one score.
        """
        weight = self.head.get("weight")
        if weight is None or len(weight) != 1:
            found = "no scoring head" if weight is None else f"a head with {len(weight)} scores"
            raise ModelError(
                f"the adapter {self.folder} has {found}, and a reward model has one score",
                "give the adapter/ folder of a reward stage with lora.r above 0",
            )
        layer = nn.Linear(weight.shape[1], 1, bias="bias" in self.head)
        layer.load_state_dict({name: tensor.float() for name, tensor in self.head.items()})
        return layer


def is_adapter(source: str) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (Path(source) / "adapter_config.json").is_file()


def read_adapter(source: str) -> StoredAdapter:
    """Read an adapter's folder.

    Raises:
        ModelError: it is no adapter of low-rank weights, or cannot be read.
    """
    folder = Path(source)
    if not is_adapter(source):
        beside = folder.parent / "adapter"
        hint = f"; its adapter is {beside}" if is_adapter(str(beside)) else ""
        raise ModelError(
            f"{source} is not an adapter: it has no adapter_config.json",
            f"give the adapter/ folder that a stage with lora.r above 0 wrote{hint}",
        )
    try:
        config: Any = PeftConfig.from_pretrained(source)
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"{source}: cannot read the adapter ({error})") from error
    if not isinstance(config, PeftLoraConfig) or not config.base_model_name_or_path:
        raise ModelError(
            f"{source}/adapter_config.json: only LoRA adapters that name their base can be used"
        )
    whole = set(config.modules_to_save or ()) - set(HEADS)
    if whole:
        raise ModelError(
            f"the adapter {source} replaces whole modules ({', '.join(sorted(whole))}), which "
            "adapters on one base cannot share",
            "train it with low-rank weights only",
        )
    head = {name.rpartition(".")[2]: t for name, t in tensors.items() if _in_head(name)}
    rest = {name: t for name, t in tensors.items() if not _in_head(name)}
    return StoredAdapter(folder, config, rest, head)


def require_base(stored: StoredAdapter, base: str, held: str) -> None:
    """Refuse an adapter that was trained on another base than `base`, held as it will be.

    The folder is compared, and, where the adapter's folder tells it, the content of the weights: a
    copy of the base elsewhere is the same base, other weights in the old place are not.

    Raises:
        ConfigError: it was trained on a quantised base, held otherwise.
        ModelError: the bases differ.
    """
    record = check_record(stored, base)
    if record is None and Path(stored.base).resolve() != Path(base).resolve():
        raise _another_base(stored, base, "")
    trained = record or "fp32"
    if is_quantised(trained) and trained != held:
        raise ConfigError(
            f"the adapter {stored.folder} was trained on a base held in {trained}, ppo.lora.base "
            f"is {held}: it corrects errors of rounding that would not be there",
            f"set ppo.lora.base to {trained}",
        )


def check_record(stored: StoredAdapter, base: str) -> str | None:
    """How the adapter's base was held, if its folder tells of the base's weights; else None.

    Raises:
        ModelError: it tells of other weights.
    """
    try:
        held = check_base(stored.folder, base)
    except ModelError as error:
        raise _another_base(stored, base, ", with other weights") from error
    return held if _tells_of_base(stored.folder) else None


def go_on_with(model: Any, stored: StoredAdapter) -> Any:
    """Put a language model's adapter on its base, to be trained further as the policy's.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    if stored.head:
        raise ModelError(
            f"{stored.folder} is a reward model's adapter, and a policy is a language model",
            "give the adapter/ folder of a supervised stage",
        )
    with _fitting(stored):
        return PeftModel.from_pretrained(
            model, str(stored.folder), adapter_name=POLICY, is_trainable=True
        )


def put_adapter(model: Any, name: str, stored: StoredAdapter) -> None:
    """Put a stored adapter on a peft model under a name of its own, without its head.

    Raises:
        ModelError: its weights do not fit the base.
    """
    _add(model, name, stored.config)
    with _fitting(stored):
        told: Any = set_peft_model_state_dict(model, stored.weights, adapter_name=name)
    missing = [key for key in told.missing_keys if f".{name}." in key]
    if missing or told.unexpected_keys:
        raise ModelError(
            f"the adapter {stored.folder} does not fit its base: "
            f"{len(missing)} weights are missing, {len(told.unexpected_keys)} have no place "
            f"({[*missing, *told.unexpected_keys][0]} for one)"
        )


@torch.no_grad()
def copy_adapter(model: Any, source: str, name: str) -> None:
    """Put a copy of one adapter on the same model under another name."""
    _add(model, name, model.peft_config[source])
    there = dict(model.named_parameters())
    for key, weight in there.items():
        if f".{source}." in key and "lora_" in key:
            there[key.replace(f".{source}.", f".{name}.")].copy_(weight)


def save_with_head(
    folder: Path,
    model: Any,
    name: str,
    head: nn.Linear,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
) -> None:
    """Write one of a model's adapters with its head as a classifier's plain peft folder.

    Args:
        folder: Written atomically.
        model: The peft model.
        name: Of the adapter.
        head: Its scalar head.
        tokenizer: Goes beside it.
        template: Told in the folder.
    """
    config = copy.deepcopy(model.peft_config[name])
    config.task_type = TaskType.SEQ_CLS
    config.modules_to_save = list(HEADS)
    config.inference_mode = True
    config.base_model_name_or_path = model.peft_config[POLICY].base_model_name_or_path
    weights = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights |= {f"{_PREFIX}score.{key}": tensor for key, tensor in head.state_dict().items()}
    with atomic_folder(folder) as partial:
        config.save_pretrained(str(partial))
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}
        save_file(tensors, partial / _WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(partial)
        write_json(partial / SIDECAR, {"template": template, "base": base_record(model)})


def leave_alone(model: Any, name: str) -> None:
    """Take every other adapter off a model, so that what is saved or merged is this one."""
    for other in [each for each in model.peft_config if each != name]:
        model.delete_adapter(other)


def _add(model: Any, name: str, like: PeftLoraConfig) -> None:
    """A fresh adapter of the same shape, its dropout off."""
    config = copy.deepcopy(like)
    config.task_type = TaskType.CAUSAL_LM
    config.modules_to_save = None
    config.inference_mode = False
    config.lora_dropout = 0.0
    config.init_lora_weights = True  # others would change the base
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        _quantised_is_not_transposed()
        model.add_adapter(name, config)


def _quantised_is_not_transposed() -> None:
    """GPT-2's layers are transposed, and not where they are quantised; peft sees it and says so."""
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")


def _in_head(name: str) -> bool:
    return any(part in HEADS for part in name.split("."))


def _tells_of_base(folder: Path) -> bool:
    path = folder / SIDECAR
    return path.is_file() and bool(read_json(path).get("base", {}).get("weights"))


def _another_base(stored: StoredAdapter, base: str, how: str) -> ModelError:
    return ModelError(
        f"{stored.folder} is an adapter on {stored.base}, the policy stands on {base}{how}: "
        "roles that share a base need the same one",
        f"train it on {base}, or leave ppo.shared_base off and give the merged model",
    )


@contextmanager
def _fitting(stored: StoredAdapter) -> Iterator[None]:
    """Weights that do not fit are a model error, also where peft only warns of them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            _quantised_is_not_transposed()
            yield
    except (ValueError, KeyError, RuntimeError, UserWarning) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the adapter {stored.folder} does not fit its base: {first}") from error
