"""The model with a value head: every family, saved and loaded every way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from suasion.classic import (
    ArgumentError,
    AutoModelForCausalLMWithValueHead,
    PPOTrainer,
    create_reference_model,
)
from suasion.models.roles import HiddenStates

from .conftest import FAMILIES, batch_of, tiny

Build = Callable[..., AutoModelForCausalLMWithValueHead]
IDS = torch.tensor([[5, 9, 40, 7], [8, 3, 12, 90]])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_logits_loss_and_values(with_head: Build, family: str) -> None:
    """Values are the head of the trunk's last hidden states."""
    model = with_head(family).eval()
    logits, loss, value = model(IDS, attention_mask=torch.ones_like(IDS))
    assert logits.shape == (2, 4, 280)
    assert loss is None
    assert value.shape == (2, 4)
    assert model(IDS, labels=IDS)[1].ndim == 0
    plain = model.pretrained_model
    hidden = HiddenStates(plain, plain.get_output_embeddings())(IDS, torch.ones_like(IDS))
    expected = model.v_head.summary(hidden.last_hidden_state).squeeze(-1)
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_steps_from_ratio_one_and_kl_zero_in_training_mode(
    with_head: Build, trainer: Callable[..., PPOTrainer], family: str
) -> None:
    """Dropout is configured, and off."""
    model = with_head(family).train()
    stats = trainer(model, batch_size=4, mini_batch_size=2).step(*batch_of(4))
    assert stats["ppo/policy/first_ratio_error"] < 1e-5
    assert stats["objective/kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_with_and_without_head(with_head: Build, family: str, tmp_path: Path) -> None:
    """Both loads give the same numbers, and plain transformers complains of nothing."""
    model = with_head(family).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval()
    for mine, theirs in zip(model(IDS), again(IDS), strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, theirs)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    torch.testing.assert_close(plain.eval()(IDS).logits, model(IDS)[0])


def test_a_plain_folder_gets_a_new_head(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Drawn as asked."""
    tiny(tokenizer).save_pretrained(tmp_path)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tmp_path, v_head_init_strategy="normal", v_head_initializer_range=1e-3
    )
    assert model.v_head.summary.weight.abs().max().item() < 0.01
    assert not model.v_head.summary.bias.any()


@pytest.mark.parametrize("layout", ["safetensors", "torch", "sharded"])
def test_heads_of_old_checkpoints(with_head: Build, layout: str, tmp_path: Path) -> None:
    """Among the model's own weights, in either format, in one file or several."""
    model = with_head()
    model.pretrained_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {f"v_head.{k}": v for k, v in model.v_head.state_dict().items()}
    if layout == "safetensors":
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    else:
        (tmp_path / "model.safetensors").unlink()
        torch.save(weights, tmp_path / "pytorch_model.bin")
    if layout == "sharded":
        (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00001.bin")
        index = ", ".join(f'"{k}": "pytorch_model-00001-of-00001.bin"' for k in weights)
        (tmp_path / "pytorch_model.bin.index.json").write_text(
            f'{{"metadata": {{"total_size": 1}}, "weight_map": {{{index}}}}}'
        )
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    torch.testing.assert_close(again.v_head.summary.weight, model.v_head.summary.weight)
    torch.testing.assert_close(again.v_head.summary.bias, model.v_head.summary.bias)


def test_half_a_head_is_refused(with_head: Build, tmp_path: Path) -> None:
    """A weight without its bias would be completed at random."""
    model = with_head()
    model.save_pretrained(tmp_path)
    save_file({"v_head.summary.weight": torch.ones(1, 32)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ArgumentError, match=r"has no summary\.bias"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))


def test_an_adapter_is_saved_with_its_head(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """And goes on training when it is loaded."""
    base = tmp_path / "base"
    tiny(tokenizer, "llama").save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(base), peft_config=lora)
    assert model.is_peft_model
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(again.eval()(IDS)[0], model.eval()(IDS)[0])
    torch.testing.assert_close(again(IDS)[2], model(IDS)[2])
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora" in n)
    with pytest.raises(ArgumentError, match="adapter already"):
        AutoModelForCausalLMWithValueHead.from_pretrained(again.pretrained_model, peft_config=lora)


def test_state_dict_has_the_published_layout_and_goes_back(with_head: Build) -> None:
    """The model's own names, and `v_head.`."""
    model, other = with_head(), with_head()
    state = model.state_dict()
    assert "v_head.summary.weight" in state
    assert "transformer.wte.weight" in state
    other.load_state_dict(state)
    torch.testing.assert_close(other.v_head.summary.weight, model.v_head.summary.weight)


def test_push_to_hub_uploads_what_is_saved(
    with_head: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model and head."""
    uploaded: dict[str, Any] = {}

    class Hub:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Made", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> None:
            uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    with_head().push_to_hub("mine")
    assert {"config.json", "model.safetensors", "value_head.safetensors"} <= uploaded["me/mine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_layers_are_one_storage_and_frozen(with_head: Build, family: str) -> None:
    """The first layer and what is before it, in both models."""
    model = with_head(family)
    reference = create_reference_model(model, num_shared_layers=1)
    mine = dict(model.pretrained_model.named_parameters())
    theirs = dict(reference.pretrained_model.named_parameters())
    assert mine.keys() == theirs.keys()
    shared = {k for k in mine if mine[k].data_ptr() == theirs[k].data_ptr()}
    assert shared == {k for k, p in mine.items() if not p.requires_grad}
    assert any("layers.0." in k or "h.0." in k for k in shared)
    assert not any("layers.1." in k or "h.1." in k for k in shared)
    assert not any(p.requires_grad for p in theirs.values())


def test_a_reference_without_shared_layers_shares_nothing(with_head: Build) -> None:
    """And freezes nothing of the model."""
    model = with_head()
    reference = create_reference_model(model)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    assert not any(a.data_ptr() == b.data_ptr() for a, b in pairs)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("layers", "pattern", "message"),
    [
        (2, None, "cannot share 2 layers"),
        (0, None, "not 1 or more"),
        (1, "x.{layer}", r"with x\.1"),
    ],
)
def test_layers_that_cannot_be_shared(
    with_head: Build, layers: int, pattern: str | None, message: str
) -> None:
    """More than there are, none, or by an unknown name."""
    with pytest.raises(ArgumentError, match=message):
        create_reference_model(with_head(), num_shared_layers=layers, pattern=pattern)


def test_only_causal_language_models_get_a_head(tokenizer: PreTrainedTokenizerFast) -> None:
    """The message names what was given."""
    with pytest.raises(ArgumentError, match="not Linear"):
        AutoModelForCausalLMWithValueHead(torch.nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match="no output embeddings"):
        AutoModelForCausalLMWithValueHead(tiny(tokenizer).transformer)
    with pytest.raises(ValueError, match="v_head_init_strategy"):
        AutoModelForCausalLMWithValueHead(tiny(tokenizer), v_head_init_strategy="uniform")
