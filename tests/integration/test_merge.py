"""Merging an adapter: what is saved answers as base and adapter did, or nothing is saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

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
from suasion.models.quantised import hold
from suasion.trainers.merge import TEXTS, merge
from suasion.trainers.sft import save_trained
from tests.unit.conftest import FAMILIES, SHAPES

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


def with_adapter(base: Path, *, head: bool, held: str = "fp32") -> Any:
    """A model whose adapter changes a lot: its weights are drawn, not zero as at the start."""
    codec = load_codec(str(base), QUESTION_ANSWER)
    model: Any = (
        new_reward_model(str(base), codec.pad_id, torch.float32, seed=0, held=held)
        if head
        else load_causal_lm(str(base), held=held)
    )
    model = add_lora(model, LoraConfig(r=4), head=head)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def put_in_place_of(base: Path, *, hidden_size: int, seed: int) -> None:
    """Save another model where a base was."""
    codec = load_codec(str(base), QUESTION_ANSWER)
    other = fresh_causal_lm(
        family="llama",
        tokenizer=codec.tokenizer,
        context=64,
        hidden_size=hidden_size,
        layers=2,
        heads=2,
        seed=seed,
    )
    save_model(base, other, codec.tokenizer, QUESTION_ANSWER)


def write_adapter(base: Path, *, head: bool, held: str = "fp32") -> Path:
    """Such an adapter in a folder of its own."""
    codec = load_codec(str(base), QUESTION_ANSWER)
    model = with_adapter(base, head=head, held=held)
    save_model(base.parent / "adapter", model, codec.tokenizer, QUESTION_ANSWER)
    return base.parent / "adapter"


def write_base(folder: Path, family: str, seed: int = 1) -> Path:
    """A tiny model of any family with random weights and a tokenizer."""
    tokenizer = train_tokenizer([row["query"] + row["response"] for row in ROWS], 270)
    special = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    config = AutoConfig.for_model(family, vocab_size=270, **special, **SHAPES[family])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    save_model(folder, model, tokenizer, QUESTION_ANSWER)
    return folder


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

    auto = AutoModelForSequenceClassification if kind else AutoModelForCausalLM
    plain = auto.from_pretrained(base, **kind)
    if kind:
        plain.config.pad_token_id = 1
    return PeftModel.from_pretrained(plain, adapter).eval()


@pytest.mark.parametrize("head", [False, True], ids=["lm", "classifier"])
@pytest.mark.parametrize(
    ("family", "held"),
    [(family, "int8") for family in FAMILIES]
    + [(family, held) for family in ("gpt2", "llama") for held in ("bf16", "nf4")],
)
def test_a_reduced_base_is_merged_as_it_was(
    tmp_path: Path,
    table: Path,
    family: str,
    held: str,
    head: bool,  # noqa: FBT001
) -> None:
    """The adapter learnt on the rounded weights, and the receipt says what that is worth."""
    base = write_base(tmp_path / "base", family)
    found = merge(configured(write_adapter(base, head=head, held=held), table), tmp_path / "merged")
    assert found["base_held"] == held
    assert found["largest_difference"] < 5e-5 < 1e-2 < found["adapter_effect"]
    model = tmp_path / "merged" / "model"
    assert not json.loads((model / "config.json").read_text()).get("quantization_config")
    loaded, report = (
        AutoModelForSequenceClassification if head else AutoModelForCausalLM
    ).from_pretrained(model, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    if head:
        given = with_adapter(base, head=True, held=held).get_base_model().score
        assert torch.equal(loaded.score.weight, given.modules_to_save["default"].weight)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_saving_after_training_dequantises_first(tmp_path: Path, family: str) -> None:
    """Merged into the codes, as the library would, the base is rounded once more."""
    base = write_base(tmp_path / "base", family)
    model = with_adapter(base, head=False, held="int8").eval()
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        given = model(input_ids=ids).logits
    codec = load_codec(str(base), QUESTION_ANSWER)
    save_trained(tmp_path / "out", model, codec.tokenizer, QUESTION_ANSWER, LoraConfig(r=4))
    saved = load_causal_lm(str(tmp_path / "out" / "model"))
    again = hold(load_causal_lm(str(tmp_path / "out" / "model")), "int8")
    size = given.abs().max()
    with torch.no_grad():
        assert (saved(input_ids=ids).logits - given).abs().max() < 1e-5 * size
        assert (again(input_ids=ids).logits - given).abs().max() > 1e-3 * size
    # The adapter beside it, loaded as a model, is the same.
    with torch.no_grad():
        merged_in_memory = load_causal_lm(str(tmp_path / "out" / "adapter"))(input_ids=ids).logits
    assert torch.allclose(merged_in_memory, given, atol=float(1e-5 * size))


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_an_adapter_on_an_adapter(base: Path, table: Path) -> None:
    """The second one lies on both, and is merged into both."""
    first = write_adapter(base, head=False, held="int8")
    first = first.rename(first.with_name("first"))
    second = write_adapter(first, head=False, held="nf4")
    settings = json.loads((second / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(first)
    found = merge(configured(second, table), base.parent / "merged")
    assert found["base_held"] == "nf4"
    assert found["largest_difference"] < 5e-5


@pytest.mark.parametrize("family", ["llama"], indirect=True)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_in_sixteen_bits(base: Path, table: Path, dtype: str) -> None:
    """Half the size; the rounding shows in the receipt, and is a small share of the effect."""
    adapter = write_adapter(base, head=False, held="int8")
    out = base.parent / "merged"
    found = merge(configured(adapter, table, dtype=dtype), out)
    assert found["dtype"] == dtype
    assert 1e-5 < found["largest_difference"] < found["tolerance"] == 0.1 * found["adapter_effect"]
    (weights,) = (out / "model").glob("*.safetensors")
    assert {t.dtype for t in load_file(weights).values()} == {
        getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])
    }
    with pytest.raises(TrainingError, match="the adapter is as it was"):
        merge(configured(adapter, table, dtype=dtype, tolerance=1e-6), base.parent / "refused")
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", ["llama"], indirect=True)
def test_a_reward_model_is_compared_on_pairs(base: Path, tmp_path: Path) -> None:
    """Where there are pairs: the change of the score, and of the accuracy."""
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"query": row["query"], "chosen": row["response"], "rejected": f"Who knows {n}?"}
        for n, row in enumerate(ROWS)
    ]
    keep_json_lines(path, rows)
    found = merge(configured(write_adapter(base, head=True, held="nf4"), path), tmp_path / "merged")
    assert found["texts"] == 2 * found["pairs"] == 2 * len(ROWS)
    assert found["pair_accuracy_before"] == found["pair_accuracy_after"]
    assert 0 < found["pair_accuracy_after"] <= 1
    assert abs(found["mean_score_change"]) < 1e-5


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
        put_in_place_of(base, hidden_size=48, seed=1)
        with pytest.raises(ModelError, match="does not fit its base"):
            merge(configured(adapter, table), base.parent / "merged")

    def test_other_base_of_the_same_shape(self, base: Path, table: Path) -> None:
        """It would fit, and be another model."""
        adapter = write_adapter(base, head=False)
        put_in_place_of(base, hidden_size=32, seed=8)
        with pytest.raises(ModelError, match="trained on other weights"):
            merge(configured(adapter, table), base.parent / "merged")

    def test_merging_twice(self, base: Path, table: Path) -> None:
        """Into its base where the merged model was put in the base's place."""
        adapter = write_adapter(base, head=False)
        merge(configured(adapter, table), base.parent / "merged")
        shutil.rmtree(base)
        (base.parent / "merged" / "model").rename(base)
        with pytest.raises(ModelError, match="merged into already"):
            merge(configured(adapter, table), base.parent / "again")
        with pytest.raises(ModelError, match="plain model already"):
            merge(configured(base, table), base.parent / "again")

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
