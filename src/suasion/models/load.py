"""Models and tokenizers: from a folder or the Hub, or from nothing; checked before use."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from suasion.core.errors import ConfigError, ModelError
from suasion.core.files import atomic_folder, read_json, write_json
from suasion.data.codec import Codec, Template
from suasion.models.adapters import base_record, check_base, merged
from suasion.models.frozen import WideHead
from suasion.models.quantised import hold, loading_options, settle

SIDECAR = "suasion.json"
"""Beside a model's own files: the template it was trained with; of an adapter, what it lies on."""
EOS = "<|endoftext|>"
PAD = "<|pad|>"


def device_for_training() -> torch.device:
    """The GPU if there is one, else the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_for(precision: str, device: torch.device) -> torch.dtype:
    """Arithmetic type for `precision`, where "auto" is bf16 on a GPU that has it, else fp32."""
    if precision == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def rest_dtype(held: str, precision: str) -> torch.dtype:
    """Type of the weights of a model that are not quantised: fp32, unless a frozen base is reduced.

    What trains is in fp32, whatever the arithmetic; what is frozen may be in the type that the
    arithmetic has anyway.
    """
    if held == "fp32":
        return torch.float32
    return torch.bfloat16 if held == "bf16" else dtype_for(precision, device_for_training())


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can end a text.

    Raises:
        ModelError: there is none, or it has no EOS token.
    """
    require_model_folder(source)
    folder = Path(source)
    if folder.is_dir() and not any(
        (folder / name).is_file()
        for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        raise ModelError(
            f"{source}: there is no tokenizer in this model folder",
            "copy tokenizer.json and tokenizer_config.json beside the weights",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{source}: cannot load the tokenizer ({_first_line(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"{source}: the tokenizer has no EOS token, so no response could ever end",
            'set "eos_token" in tokenizer_config.json',
        )
    tokenizer.truncation_side = "right"
    return tokenizer


def load_codec(source: str, template: str) -> Codec:
    """Load the tokenizer of `source` with `template` and the tokens that end its responses.

    Stop tokens come from generation_config.json where it names any: published models correct
    there what config.json has wrong.

    Raises:
        ConfigError: the template does not name its two fields.
        ModelError: no tokenizer, no EOS, or the model was trained with another template.
    """
    parsed = Template.parse(template)
    tokenizer = load_tokenizer(source)
    trained = _sidecar(source).get("template")
    if trained is not None and trained != template:
        raise ModelError(
            f"{source} was trained with the template {trained!r}, this stage uses {template!r}",
            "use one template in every stage",
        )
    stop_ids = _stop_ids(source, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    return Codec(tokenizer, parsed, stop_ids, int(pad_id))


def load_causal_lm(
    source: str, dtype: torch.dtype = torch.float32, *, held: str = "fp32"
) -> PreTrainedModel:
    """Load a causal language model; the adapter of an adapter folder is merged in memory.

    Args:
        source: Folder or Hub name.
        dtype: Of the weights; of those that are not quantised, where some are.
        held: How the linear layers are held; see `suasion.models.quantised`.

    Raises:
        ConfigError: `held` cannot be had here.
        ModelError: the folder is missing, incomplete, or not such a model.
    """
    return _load(AutoModelForCausalLM, source, dtype, held)


def load_reward_model(
    source: str, dtype: torch.dtype = torch.float32, *, held: str = "fp32"
) -> PreTrainedModel:
    """Load a sequence-classification model with one score.

    Args:
        source: Folder or Hub name.
        dtype: Of the weights; of those that are not quantised, where some are.
        held: How the linear layers are held.

    Raises:
        ConfigError: `held` cannot be had here.
        ModelError: the folder is missing or incomplete, or its scoring head is not in it.
    """
    model = _load(AutoModelForSequenceClassification, source, dtype, held, heads=True)
    if model.config.num_labels != 1:
        raise ModelError(
            f"{source}: a reward model gives one score, this one has {model.config.num_labels}",
            f"use it as a classifier instead: pipeline:{source}#LABEL",
        )
    return model


def new_reward_model(
    source: str, pad_id: int, dtype: torch.dtype, *, seed: int, held: str = "fp32"
) -> PreTrainedModel:
    """A sequence-classification model with one score on the trunk of a causal LM.

    The head starts from N(0, 1/sqrt(d + 1)) as in openai/lm-human-preferences@cbfd210b; the
    library's own initialisation is far smaller and learns more slowly. It is in fp32 always.
    """
    model = _load(AutoModelForSequenceClassification, source, dtype, held, num_labels=1)
    model.config.pad_token_id = pad_id
    model.config.problem_type = "regression"
    head = score_head(model)
    if head.weight.dtype is not torch.float32:
        head = WideHead.on(model, head)
    generator = torch.Generator().manual_seed(seed)
    spread = 1.0 / (head.in_features + 1) ** 0.5
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * spread)
        if head.bias is not None:
            head.bias.zero_()
    return model


def score_head(model: Any) -> torch.nn.Linear:
    """The linear layer of a sequence-classification model that gives its scores.

    Raises:
        ModelError: the family keeps it elsewhere.
    """
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):
            return head
    raise ModelError(f"{type(model).__name__} has no linear scoring head")


def save_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Write a plain transformers (or peft) folder with its tokenizer and template, atomically."""
    told: dict[str, Any] = {"template": template}
    options: dict[str, Any] = {}
    if hasattr(model, "peft_config"):
        told["base"] = base_record(model)
        options["save_embedding_layers"] = False  # peft would look whether the vocabulary grew
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial, safe_serialization=True, **options)
        tokenizer.save_pretrained(partial)
        write_json(partial / SIDECAR, told)


def context_of(config: PretrainedConfig) -> int:
    """Longest sequence the positions of this model reach, in tokens."""
    for name in ("max_position_embeddings", "n_positions", "seq_length", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 20  # ALiBi and the like: no limit of its own


def switch_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability to zero; the rollout and the update must be one function."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "attn_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def train_tokenizer(
    texts: Iterable[str] | Iterator[str], vocabulary: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with separate EOS and padding tokens.

    Args:
        texts: What to learn the merges from.
        vocabulary: Size, the two special tokens included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def fresh_causal_lm(
    *,
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    hidden_size: int,
    layers: int,
    heads: int,
    seed: int,
) -> PreTrainedModel:
    """A randomly initialised model of a small shape, without dropout.

    The libraries' initial spread of 0.02 is meant for widths near 1000. It shrinks here with the
    width as 0.7 / sqrt(hidden_size): at width 128 such a model learnt to copy from its prompt
    within 700 steps, and one that began with 0.02 did not (docs/log.md).

    Raises:
        ConfigError: the width is not a multiple of the heads.
    """
    if hidden_size % heads:
        raise ConfigError(f"hidden_size {hidden_size} is not a multiple of heads {heads}")
    special: dict[str, Any] = {
        "initializer_range": 0.7 / hidden_size**0.5,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    config: PretrainedConfig
    if family == "gpt2":
        config = GPT2Config(
            n_positions=context,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **special,
        )
    else:
        config = LlamaConfig(
            max_position_embeddings=context,
            hidden_size=hidden_size,
            intermediate_size=(hidden_size * 8 // 3 + 31) // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            **special,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return with_fused_activations(model)


def _load(
    kind: Any,
    source: str,
    dtype: torch.dtype,
    held: str = "fp32",
    *,
    heads: bool = False,
    **options: Any,
) -> Any:
    require_model_folder(source)
    folder = Path(source)
    placed = loading_options(held, dtype, device_for_training())
    try:
        if (folder / "adapter_config.json").is_file():
            return hold(_load_adapter(kind, folder, **options).to(placed["dtype"]), held)
        with warnings.catch_warnings():
            # A folder that is quantised already decides how; `settle` looks whether it is so.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, report = kind.from_pretrained(
                source, output_loading_info=True, use_safetensors=True, **placed, **options
            )
    except SafetensorError as error:
        raise ModelError(f"{source}: the weights are damaged ({_first_line(error)})") from error
    except (OSError, ValueError, KeyError, json.JSONDecodeError, RuntimeError) as error:
        raise ModelError(f"{source}: cannot load the model ({_first_line(error)})") from error
    fresh_head = kind is AutoModelForSequenceClassification and not heads
    lost = [key for key in report["missing_keys"] if not (fresh_head and "score" in key)]
    if lost:
        raise ModelError(
            f"{source}: {len(lost)} weights are not in the folder, {lost[0]} for one",
            "they would have been drawn at random; save the model with all its heads",
        )
    return settle(with_fused_activations(model), held)


def with_fused_activations(model: Any) -> Any:
    """Replace the GELU that some families spell out in eight operations by torch's single one.

    The same formula in one pass over the largest activations of a layer, which keeps one of them
    for the backward pass instead of several.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))
    return model


def _load_adapter(kind: Any, folder: Path, **options: Any) -> Any:
    """Base and adapter as one model in fp32, whatever the base was held in when it trained."""
    from peft import PeftModel

    base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
    if kind is AutoModelForSequenceClassification:
        options.setdefault("num_labels", 1)
    held = check_base(folder, base)
    plain = _load(kind, base, torch.float32, held, **options)
    model = merged(PeftModel.from_pretrained(plain, str(folder)))
    model.name_or_path = str(folder)  # an adapter put on this one lies on both
    return model


def require_model_folder(source: str) -> None:
    """Refuse what is neither a model folder nor a name that the Hub may know.

    A name with a separator that is no folder is a mistyped path more often than a Hub name.

    Raises:
        ModelError: there is no such folder, or no model in it.
    """
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    looks_local = looks_local or ("/" in source and Path(source).parent.is_dir())
    if looks_local and not Path(source).is_dir():
        raise ModelError(f"no such model folder: {source}", "check the path")
    if Path(source).is_dir() and not any(
        (Path(source) / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        raise ModelError(f"{source} is not a model folder: it has no config.json")


def _sidecar(source: str) -> dict[str, Any]:
    path = Path(source) / SIDECAR
    return dict(read_json(path)) if path.is_file() else {}


def _stop_ids(source: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Stop tokens by precedence: generation_config.json, config.json, tokenizer."""
    found: int | list[int] | None = None
    folder = Path(source)
    if not folder.is_dir() or (folder / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(source).eos_token_id
        except OSError:
            found = None
    if found is None and (not folder.is_dir() or (folder / "config.json").is_file()):
        found = AutoConfig.from_pretrained(source).eos_token_id
    if found is None:
        found = int(tokenizer.eos_token_id)
    return tuple(found) if isinstance(found, list) else (int(found),)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
