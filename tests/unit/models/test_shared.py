"""Adapters on one base, from folders and to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from suasion.config.schema import QUESTION_ANSWER, LoraConfig
from suasion.core.errors import ModelError
from suasion.core.files import read_json, write_json
from suasion.models.adapters import add_lora
from suasion.models.load import load_causal_lm, load_reward_model, save_model
from suasion.models.scope import AdapterScope
from suasion.models.shared import (
    CRITIC,
    POLICY,
    copy_adapter,
    leave_alone,
    put_adapter,
    read_adapter,
    save_with_head,
)


@pytest.fixture
def model(model_folder: Path) -> Any:
    """A base with the policy's adapter, which has learnt something."""
    made = add_lora(load_causal_lm(str(model_folder)), LoraConfig(r=2), dropout=False)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw) * 0.2)
    return made.eval()


@pytest.fixture
def folder(model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The adapter with a head, as a critic is saved."""
    head = nn.Linear(32, 1, bias=False)
    copy_adapter(model, POLICY, CRITIC)
    save_with_head(tmp_path / "critic", model, CRITIC, head, tokenizer, QUESTION_ANSWER)
    return tmp_path / "critic"


def test_what_is_saved_is_read_again(model: Any, folder: Path) -> None:
    """Under another name on the same base: the same weights, and the head apart."""
    stored = read_adapter(str(folder))
    put_adapter(model, "again", stored)
    scope = AdapterScope(model, POLICY)
    scope.add("again", learns=True)
    scope.add(CRITIC, learns=True)
    pairs = zip(scope.parameters("again"), scope.parameters(CRITIC), strict=True)
    assert all(torch.equal(one, other) for (_, one), (_, other) in pairs)
    assert set(stored.head) == {"weight"}


def test_a_critic_s_folder_is_a_reward_model_s(model: Any, folder: Path) -> None:
    """It loads as a classifier with one score, which is the head on the adapted trunk."""
    whole: Any = load_reward_model(str(folder))
    ids = torch.tensor([[5, 6, 7, 8]])
    scope = AdapterScope(model, POLICY)
    scope.add(CRITIC, learns=True)
    with torch.no_grad(), scope.use(CRITIC):
        hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state[:, -1]
    head = read_adapter(str(folder)).head
    expected = hidden @ head["weight"].T
    assert torch.allclose(whole(ids).logits, expected, atol=1e-4)


def test_other_roles_leave_nothing_in_the_policy_s_folder(
    model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Its adapter is written as if it had always been alone."""
    assert folder.is_dir()
    leave_alone(model, POLICY)
    save_model(tmp_path / "policy", model, tokenizer, QUESTION_ANSWER)
    assert not [path for path in (tmp_path / "policy").iterdir() if path.is_dir()]
    assert read_adapter(str(tmp_path / "policy")).config.r == 2


def test_what_is_no_adapter_is_refused(model_folder: Path, folder: Path, model: Any) -> None:
    """Plain models, damaged files, missing weights, whole modules, and heads of other sizes."""
    with pytest.raises(ModelError, match="is not an adapter"):
        read_adapter(str(model_folder))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    some = next(name for name in tensors if "lora_A" in name)

    save_file({name: t for name, t in tensors.items() if name != some}, weights)
    with pytest.raises(ModelError, match="1 weights are missing"):
        put_adapter(model, "other", read_adapter(str(folder)))
    save_file({**tensors, some: tensors[some][:, :-1].contiguous()}, weights)
    with pytest.raises(ModelError, match="does not fit its base"):
        put_adapter(model, "another", read_adapter(str(folder)))
    head = next(name for name in tensors if name.endswith("score.weight"))
    save_file({**tensors, head: torch.ones(3, 32)}, weights)
    with pytest.raises(ModelError, match="a head with 3 scores"):
        read_adapter(str(folder)).new_head()

    weights.write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot read the adapter"):
        read_adapter(str(folder))
    settings = read_json(folder / "adapter_config.json")
    save_file(tensors, weights)
    write_json(folder / "adapter_config.json", {**settings, "modules_to_save": ["lm_head"]})
    with pytest.raises(ModelError, match=r"replaces whole modules \(lm_head\)"):
        read_adapter(str(folder))
