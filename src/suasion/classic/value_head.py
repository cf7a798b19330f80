"""A causal language model with a scalar value head, and references made from one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from suasion.classic.arguments import with_adapter
from suasion.classic.errors import ArgumentError
from suasion.classic.head_files import HEAD_FILE, read_head
from suasion.core.files import atomic_path
from suasion.models.references import LAYERS, front_parameters, frozen_copy

_HEAD_OPTIONS = ("summary_dropout_prob", "v_head_initializer_range", "v_head_init_strategy")


class ValueHead(nn.Module):
    """Dropout and one linear layer: hidden states [..., D] to values [..., 1].

    Args:
        hidden_size: Width of the hidden states.
        summary_dropout_prob: Dropout on them; switched off in PPO.
        v_head_init_strategy: "normal" draws weights from N(0, `v_head_initializer_range`) with a
            zero bias; None keeps torch's own initialisation.
        v_head_initializer_range: See there.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        summary_dropout_prob: float = 0.1,
        v_head_init_strategy: str | None = None,
        v_head_initializer_range: float = 0.2,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(summary_dropout_prob)
        self.summary = nn.Linear(hidden_size, 1)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)
        elif v_head_init_strategy is not None:
            raise ArgumentError(
                f"v_head_init_strategy is {v_head_init_strategy!r}", 'choose "normal" or None'
            )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values, in the precision of the head."""
        out: Tensor = self.summary(self.dropout(hidden_states).to(self.summary.weight.dtype))
        return out


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal LM of any decoder family with a value head on its last hidden states.

    Args:
        pretrained_model: A transformers causal LM, or a peft model of one.
        head_options: For `ValueHead`.
    """

    def __init__(self, pretrained_model: Any, **head_options: Any) -> None:
        super().__init__()
        if not isinstance(pretrained_model, PreTrainedModel | PeftModel):
            raise ArgumentError(
                f"a value head needs a transformers or peft model, not "
                f"{type(pretrained_model).__name__}"
            )
        head = pretrained_model.get_output_embeddings()
        if head is None:
            raise ArgumentError(
                f"{type(pretrained_model).__name__} is no causal language model: it has no output "
                "embeddings"
            )
        self.pretrained_model: Any = pretrained_model
        # Of the output layer, not of the configuration: OPT projects its hidden states before it.
        self.v_head = ValueHead(int(head.weight.shape[1]), **head_options)
        if getattr(pretrained_model, "hf_device_map", None):
            self.v_head.to(head.weight.device)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        peft_config: PeftConfig | None = None,
        is_trainable: bool = True,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        **kwargs: Any,
    ) -> AutoModelForCausalLMWithValueHead:
        """Load a model and, where it was saved with one, its value head.

        Args:
            pretrained_model_name_or_path: A folder or Hub name of a model or an adapter, or a model
                in memory.
            model_args: For `AutoModelForCausalLM.from_pretrained`.
            peft_config: Put this new adapter on the model.
            is_trainable: Go on training the adapter of an adapter folder.
            load_in_8bit: Quantise the weights to 8 bit (needs bitsandbytes and a GPU).
            load_in_4bit: The same with 4 bit.
            kwargs: Options of `ValueHead`; the rest as `model_args`.

        Raises:
            ArgumentError: the model cannot have a value head, or a saved head is incomplete.
        """
        head_options = {name: kwargs.pop(name) for name in _HEAD_OPTIONS if name in kwargs}
        if load_in_8bit or load_in_4bit:
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit
            )
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        source = pretrained_model_name_or_path
        if isinstance(source, str | Path):
            model = _load(str(source), model_args, kwargs, is_trainable=is_trainable)
        else:
            model = source
        whole = cls(with_adapter(model, peft_config), **head_options)
        saved = read_head(str(source)) if isinstance(source, str | Path) else None
        if saved is not None:
            whole.v_head.load_state_dict(saved)
        return whole

    @property
    def is_peft_model(self) -> bool:
        """Whether adapters are on the model."""
        return isinstance(self.pretrained_model, PeftModel)

    @property
    def config(self) -> Any:
        """Configuration of the language model."""
        return self.pretrained_model.config

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return self.v_head.summary.weight.device

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,  # noqa: FBT001, FBT002 (the published signature)
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run the model and its head.

        Args:
            input_ids: Token ids, [B, T].
            past_key_values: A cache to go on from.
            attention_mask: 1 at real tokens, [B, T].
            return_past_key_values: Give the cache back as a fourth entry.
            kwargs: For the language model; with `labels` there is a loss.

        Returns:
            Logits [B, T, V] in float32 or wider, the loss or None, values [B, T].
        """
        kwargs["output_hidden_states"] = True
        out = self.pretrained_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )
        value = self.v_head(out.hidden_states[-1]).squeeze(-1)
        logits = out.logits
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        result = (logits, out.loss, value)
        return (*result, out.past_key_values) if return_past_key_values else result

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The language model's own `generate`."""
        return self.pretrained_model.generate(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute activations in the backward pass."""
        self._checkpointing("enable")(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations."""
        self._checkpointing("disable")()

    def _checkpointing(self, verb: str) -> Any:
        """The method under its newer name, where this transformers has it."""
        newer = getattr(self.pretrained_model, f"activation_checkpointing_{verb}", None)
        return newer or getattr(self.pretrained_model, f"gradient_checkpointing_{verb}")

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The language model's weights under their own names and the head's under `v_head.`."""
        found = self.pretrained_model.state_dict(*args, prefix=prefix, **kwargs)
        found.update(self.v_head.state_dict(*args, prefix=f"{prefix}v_head.", **kwargs))
        return dict(found)

    def load_state_dict(  # type: ignore[override]
        self,
        state_dict: dict[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002 (torch's signature)
        assign: bool = False,  # noqa: FBT001, FBT002 (torch's signature)
    ) -> None:
        """Take weights in the layout of `state_dict`."""
        head = {k: v for k, v in state_dict.items() if k.startswith("v_head.")}
        rest = {k: v for k, v in state_dict.items() if k not in head}
        self.pretrained_model.load_state_dict(rest, strict=strict, assign=assign)
        bare = {k.removeprefix("v_head."): v for k, v in head.items()}
        self.v_head.load_state_dict(bare, strict=strict, assign=assign)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a plain transformers (or peft) folder and, beside it, the head.

        The head has a file of its own, so that the folder loads without it and without complaint.

        Args:
            save_directory: Created where it is missing.
            kwargs: For the language model's `save_pretrained`.
        """
        from safetensors.torch import save_file

        kwargs.pop("state_dict", None)  # may hold the head's weights, which have their own file
        self.pretrained_model.save_pretrained(str(save_directory), **kwargs)
        tensors = {f"v_head.{k}": v.contiguous().cpu() for k, v in self.v_head.state_dict().items()}
        with atomic_path(Path(save_directory) / HEAD_FILE) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: Where to; created where it is missing.
            kwargs: `private` and `token` for the repository, the rest for the upload.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=kwargs.pop("token", None))
        made = api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return api.upload_folder(repo_id=made.repo_id, folder_path=folder, **kwargs)


def create_reference_model(
    model: AutoModelForCausalLMWithValueHead,
    num_shared_layers: int | None = None,
    pattern: str | None = None,
) -> AutoModelForCausalLMWithValueHead:
    """A frozen copy of `model` that may share its first layers.

    Shared parameters (the first layers and everything in front of them, with tied output embeddings
    the output too) are the very same tensors in both models: they cost no memory, and they are
    frozen in `model` as well, or the reference would move with it.

    Args:
        model: The model to be held near.
        num_shared_layers: How many layers to share; None shares nothing.
        pattern: Name of a layer with `{layer}` for its number; None tries the known families.

    Raises:
        ArgumentError: the pattern fits no parameter, or the model has no more layers than that.
    """
    shared: list[nn.Parameter] = []
    if num_shared_layers is not None:
        shared = _first_parameters(model, num_shared_layers, pattern)
    copied: AutoModelForCausalLMWithValueHead = frozen_copy(model, shared)
    return copied


def _first_parameters(
    model: AutoModelForCausalLMWithValueHead, layers: int, pattern: str | None
) -> list[nn.Parameter]:
    """Parameters in front of layer number `layers`."""
    if model.is_peft_model:
        raise ArgumentError(
            "a model with adapters shares all its layers with the reference already",
            "leave num_shared_layers and ref_model out: the reference is the base, adapters off",
        )
    if layers < 1:
        raise ArgumentError(f"num_shared_layers is {layers}, not 1 or more")
    tried = (pattern,) if pattern else LAYERS
    found = front_parameters(model.pretrained_model, layers, tried)
    if found is not None:
        return found
    raise ArgumentError(
        f"cannot share {layers} layers: no parameter begins with "
        f"{' or '.join(candidate.format(layer=layers) for candidate in tried)}",
        "share fewer layers than the model has, or name its layers with pattern",
    )


def _load(source: str, args: Any, kwargs: dict[str, Any], *, is_trainable: bool) -> Any:
    """A causal LM, or one with the adapter of an adapter folder."""
    if not (Path(source) / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(source, *args, **kwargs)
    base = PeftConfig.from_pretrained(source).base_model_name_or_path
    if base is None:
        raise ArgumentError(f"{source}/adapter_config.json does not name its base model")
    model = AutoModelForCausalLM.from_pretrained(base, *args, **kwargs)
    return PeftModel.from_pretrained(model, source, is_trainable=is_trainable)
