"""Merging an adapter: what is saved answers as base and adapter did, or nothing is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from suasion.config.schema import QUESTION_ANSWER, LoraConfig, MergeConfig
from suasion.core.errors import ModelError, TrainingError
from suasion.core.files import keep_json_lines
from suasion.models.adapters import add_lora
from suasion.models.load import (
    fresh_causal_lm,
    load_causal_lm,
    load_codec,
    load_reward_model,
    new_reward_model,
    save_model,
    train_tokenizer,
)
from suasion.trainers.merge import TEXTS, merge

ROWS = [
    {"query": f"How many are {n} and {n + 1}?", "response": f"They are {2 * n + 1}."}
    for n in range(TEXTS + 8)
]


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Both ways to hold a linear layer: transposed with a bias, and plain."""
    return str(request.param)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of short questions and answers."""
    path = tmp_path / "texts.jsonl"
    keep_json_lines(path, ROWS)
    return path


@pytest.fixture
def base(tmp_path: Path, family: str) -> Path:
    """A tiny model with random weights."""
    tokenizer = train_tokenizer([row["query"] + row["response"] for row in ROWS], 270)
    model = fresh_causal_lm(
        family=family, tokenizer=tokenizer, context=64, hidden_size=32, layers=2, heads=2, seed=1
    )
    save_model(tmp_path / "base", model, tokenizer, QUESTION_ANSWER)
    return tmp_path / "base"


def write_adapter(base: Path, *, head: bool) -> Path:
    """An adapter that changes a lot: its weights are drawn, not zero as at the start."""
    codec = load_codec(str(base), QUESTION_ANSWER)
    model: Any = (
        new_reward_model(str(base), codec.pad_id, torch.float32, seed=0)
        if head
        else load_causal_lm(str(base))
    )
    model = add_lora(model, LoraConfig(r=4), head=head)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    save_model(base.parent / "adapter", model, codec.tokenizer, QUESTION_ANSWER)
    return base.parent / "adapter"


def configured(adapter: Path, table: Path, **more: Any) -> MergeConfig:
    """The stage's options."""
    return MergeConfig(model=str(adapter), data=str(table), **more)


@pytest.mark.parametrize("head", [False, True], ids=["lm", "classifier"])
def test_merged_model_is_base_and_adapter(base: Path, table: Path, head: bool) -> None:  # noqa: FBT001
    """The saved folder is plain, and answers as base and adapter together did."""
    adapter = write_adapter(base, head=head)
    out = base.parent / "merged"
    found = merge(configured(adapter, table), out)

    assert json.loads((out / "merge.json").read_text()) == found
    assert sorted(path.name for path in out.iterdir()) == ["merge.json", "model"]
    assert found["texts"] == TEXTS
    assert found["largest_difference"] < 1e-5 < 1e-2 < found["adapter_effect"]
    assert 0 <= found["mean_difference"] <= found["largest_difference"]
    assert ("kl" in found) is not head
    assert not (out / "model" / "adapter_config.json").exists()
    assert json.loads((out / "model" / "suasion.json").read_text())["template"] == QUESTION_ANSWER
    load_codec(str(out / "model"), QUESTION_ANSWER)

    # Independent of what `merge` measured: the unmerged adapter against the saved folder.
    load = load_reward_model if head else load_causal_lm
    kind = {"num_labels": 1} if head else {}
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        given = unmerged(base, adapter, **kind)(input_ids=ids).logits
        assert torch.allclose(load(str(out / "model"))(input_ids=ids).logits, given, atol=1e-5)


def unmerged(base: Path, adapter: Path, **kind: Any) -> Any:
    """Base and adapter as peft itself puts them together."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if kind else AutoModelForCausalLM
    plain = auto.from_pretrained(base, **kind)
    if kind:
        plain.config.pad_token_id = 1
    return PeftModel.from_pretrained(plain, adapter).eval()


def test_no_model_at_all(tmp_path: Path, table: Path) -> None:
    """A folder that is not there."""
    with pytest.raises(ModelError, match="no adapter_config"):
        merge(configured(tmp_path / "nothing", table), tmp_path / "merged")


@pytest.mark.parametrize("family", ["llama"], indirect=True)
class TestRefusals:
    """What cannot be merged, and what must not be kept."""

    def test_beyond_tolerance_no_model_is_left(self, base: Path, table: Path) -> None:
        """A merge that changes too much leaves no model."""
        out = base.parent / "merged"
        with pytest.raises(TrainingError, match="over the tolerance of 1e-12"):
            merge(configured(write_adapter(base, head=False), table, tolerance=1e-12), out)
        assert not (out / "model").exists()
        assert not (out / "merge.json").exists()

    def test_plain_model(self, base: Path, table: Path) -> None:
        """Nothing to merge."""
        with pytest.raises(ModelError, match="plain model already"):
            merge(configured(base, table), base.parent / "merged")

    def test_plain_model_beside_its_adapter(self, base: Path, table: Path) -> None:
        """The message names the adapter that a stage kept beside its merged model."""
        adapter = write_adapter(base, head=False)
        with pytest.raises(ModelError, match=f"its adapter is {adapter}"):
            merge(configured(base, table), base.parent / "merged")

    def test_base_is_gone(self, base: Path, table: Path) -> None:
        """The base was moved."""
        adapter = write_adapter(base, head=False)
        base.rename(base.with_name("elsewhere"))
        with pytest.raises(ModelError, match="cannot be loaded: no such model folder"):
            merge(configured(adapter, table), base.parent / "merged")

    def test_other_base(self, base: Path, table: Path) -> None:
        """The base has another shape."""
        adapter = write_adapter(base, head=False)
        codec = load_codec(str(base), QUESTION_ANSWER)
        wider = fresh_causal_lm(
            family="llama",
            tokenizer=codec.tokenizer,
            context=64,
            hidden_size=48,
            layers=2,
            heads=2,
            seed=1,
        )
        save_model(base, wider, codec.tokenizer, QUESTION_ANSWER)
        with pytest.raises(ModelError, match="does not fit its base"):
            merge(configured(adapter, table), base.parent / "merged")

    @pytest.mark.parametrize(("part", "head"), [("score", True), ("layers.1", False)])
    def test_weights_are_missing(self, base: Path, table: Path, part: str, head: bool) -> None:  # noqa: FBT001
        """Weights that would have been drawn at random."""
        adapter = write_adapter(base, head=head)
        file = adapter / "adapter_model.safetensors"
        kept = {name: tensor for name, tensor in load_file(file).items() if part not in name}
        save_file(kept, file, {"format": "pt"})
        with pytest.raises(ModelError, match="no scoring head" if head else "missing adapter keys"):
            merge(configured(adapter, table), base.parent / "merged")

    def test_other_task(self, base: Path, table: Path) -> None:
        """An adapter of another kind of model."""
        adapter = write_adapter(base, head=False)
        path = adapter / "adapter_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "task_type": "TOKEN_CLS"}))
        with pytest.raises(ModelError, match="TOKEN_CLS"):
            merge(configured(adapter, table), base.parent / "merged")
