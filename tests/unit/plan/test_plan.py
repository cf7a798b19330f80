"""What a plan says is what happens: against real tensors, rules of thumb, and its own sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from suasion.cli.main import main
from suasion.config.schema import (
    LoraConfig,
    PpoConfig,
    ReferenceConfig,
    ResponseConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.errors import ConfigError, ModelError
from suasion.models.load import with_fused_activations
from suasion.models.roles import Policy
from suasion.plan.advice import largest
from suasion.plan.cards import CONTEXT, Card, named
from suasion.plan.hollow import furnish, held_by, hollow_model, tensors_of
from suasion.plan.ledger import Ledger, Peak, without_contents
from suasion.plan.planner import Planner
from suasion.plan.rehearse import Rehearsal, Workshop, trainer_optimizer
from suasion.plan.states import measured_states
from suasion.trainers.packed import causal_lm_loss
from tests.unit.conftest import FAMILIES, tiny_config, tiny_model

CARD = Card("test", 10**9, gpu=False, process=0, flops=1e12)
GPU = Card("test", 10**9, gpu=True, process=CONTEXT, flops=1e12)
NEOX = {
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "vocab_size": 50432,
}


def shape(tmp_path: Path, family: str = "llama") -> str:
    """A folder with nothing but a configuration."""
    tiny_config(family).save_pretrained(tmp_path / family)
    return str(tmp_path / family)


def supervised_peak(model: Any) -> Peak:
    """Peak of a forward and backward pass, on whatever tensors the model has."""
    ledger = Ledger(vocabulary=300)
    ledger.know(tensors_of(model))
    with ledger:
        policy = Policy(model, 1.0)
        model.train()
        ledger.start()
        causal_lm_loss(policy, {"input_ids": torch.ones(3, 20, dtype=torch.long)}).backward()
        for parameter in model.parameters():
            parameter.grad = None
    return ledger.peak()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("opt", "bloom")])
def test_hollow_model_holds_what_a_real_one_holds(family: str) -> None:
    """Byte for byte, by label."""
    hollow = hollow_model(tiny_config(family))
    with without_contents():
        predicted = supervised_peak(furnish(hollow))
    real = with_fused_activations(tiny_model(family))
    assert predicted == supervised_peak(real)


def test_ledger_knows_the_moment() -> None:
    """Two thirds of it at once, never all of it: a closed form, and a negative control."""
    with without_contents(), Ledger() as ledger:
        ledger.start()
        first = torch.empty(2048, 4096)
        second = first * 2
        del first
        third = second * 2
        del second, third
    assert ledger.peak().total == 2 * 2048 * 4096 * 4
    assert ledger.peak().total < 3 * 2048 * 4096 * 4


def test_bytes_per_parameter() -> None:
    """Rows A7 and D1: bf16 with Adam's two states 10 bytes; int8 1, 16 bits 2, fp32 4."""
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32000
    )
    half = hollow_model(config, held="bf16")
    held = held_by(half, tensors_of(half))
    adam = measured_states(torch.optim.AdamW, {})(held.parameters)
    assert held.parameters == pytest.approx(7e9, rel=0.05)
    assert (sum(held.weights.values()) + adam) / held.parameters == pytest.approx(10, rel=1e-3)
    big = AutoConfig.for_model("gpt_neox", **NEOX)
    for kind, rest, expected in (
        ("fp32", torch.float32, 4.0),
        ("bf16", torch.bfloat16, 2.0),
        ("int8", torch.bfloat16, 1.0),
    ):
        model = hollow_model(big, held=kind, rest=rest)
        found = held_by(model, tensors_of(model))
        assert found.parameters == pytest.approx(20.55e9, rel=0.01)
        each = sum(found.weights.values()) / found.parameters
        assert each == pytest.approx(expected, rel=0.05)


def test_int8_with_adapters_takes_little_more_than_its_base(tmp_path: Path) -> None:
    """Row A7: 1.2 to 1.4 GB per billion parameters, gradients, states and activations included."""
    shallow = NEOX | {"num_hidden_layers": 8, "vocab_size": 2000}  # as deep models: few words
    AutoConfig.for_model("gpt_neox", **shallow).save_pretrained(tmp_path / "neox")
    lora = LoraConfig(r=16, base="int8", checkpointing=True, merge=False)
    config = SftConfig(model=str(tmp_path / "neox"), batch_size=1, block=256, lora=lora)
    stage = Planner(GPU).stage("sft", config)
    update = next(phase for phase in stage.phases if phase.name == "update")
    assert 1.05 < update.total / stage.roles[0].parameters < 1.4


@pytest.mark.parametrize("shared", [False, True])
def test_roles_on_one_base_are_counted_once(tmp_path: Path, *, shared: bool) -> None:
    """With adapters the reference costs nothing; without, a second model."""
    source = shape(tmp_path)
    config = PpoConfig(
        model=source,
        reward="a.b:c",
        prompt_tokens=8,
        response=ResponseConfig(max_tokens=4),
        batch_size=4,
        mini_batch_size=4,
        lora=LoraConfig(r=4 if shared else 0),
    )
    names = [role.name for role in Planner(CARD).stage("ppo", config).roles]
    assert ("reference" in names) is not shared


def test_reference_kinds_order_as_they_should(tmp_path: Path) -> None:
    """A whole copy takes most, shared layers less, none least."""
    source = shape(tmp_path)
    totals = []
    for reference in (
        ReferenceConfig(),
        ReferenceConfig(kind="layers", layers=1),
        ReferenceConfig(kind="none"),
    ):
        config = PpoConfig(
            model=source,
            reward="a.b:c",
            prompt_tokens=8,
            batch_size=4,
            mini_batch_size=4,
            response=ResponseConfig(max_tokens=4),
            reference=reference,
        )
        stage = Planner(CARD).stage("ppo", config)
        totals.append(stage.peak.parts["weights"])
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_more_never_takes_less(tmp_path: Path, name: str) -> None:
    """Batch after batch, length after length."""
    source = shape(tmp_path, "gpt2")
    planner = Planner(CARD)

    def update(batch: int, length: int) -> int:
        config = {
            "sft": SftConfig(model=source, batch_size=batch, block=length, evaluation_rows=1),
            "reward": RewardConfig(
                model=source, batch_size=batch, max_length=length, evaluation_pairs=1
            ),
        }[name]
        return planner.stage(name, config).phases[0].total

    for sizes in ([(1, 16), (2, 16), (7, 16), (16, 16), (40, 16)], [(4, 4), (4, 16), (4, 60)]):
        totals = [update(*size) for size in sizes]
        assert totals == sorted(totals)


def test_states_of_an_optimizer_in_8_bits() -> None:
    """One byte for each of Adam's two states, and a little for their scales."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    size = measured_states(bitsandbytes.optim.AdamW8bit, {})
    assert 2.0 <= size(1 << 24) / (1 << 24) < 2.1
    assert size(100) == 800


def test_the_trainers_optimizer_is_booked() -> None:
    """Two states of four bytes for each weight that trains."""
    shop = Workshop()
    model = shop.model("policy", tiny_config("llama"))
    stage = Rehearsal(shop.world, 300, 0)
    stage.add("policy", model)
    stage.train(trainer_optimizer, {"policy": (list(model.parameters()), 1e-3)})
    (role,) = stage.roles
    assert role.gradients == 4 * role.trainable
    assert 8 * role.trainable <= role.optimizer < 8.01 * role.trainable


@pytest.mark.parametrize(("memory", "expected"), [(0, 0), (100, 10), (1000, 100), (10**6, 4096)])
def test_largest(memory: int, expected: int) -> None:
    """Of a line; at most a sixteenth below the best, and never above."""
    found = largest(lambda value: 10 * value, 8, 4096, memory, 80)
    assert expected * 15 // 16 <= found <= expected


@pytest.mark.parametrize(
    ("text", "memory"), [("24GB", 24 * 10**9), ("24 GiB", 24 << 30), ("RTX 3090", 24 << 30)]
)
def test_cards(text: str, memory: int) -> None:
    """By size or by name."""
    assert named(text).memory == memory


@pytest.mark.parametrize("text", ["rtx9999", "24", "-1GB", "0.1MB", "lots"])
def test_cards_that_are_none(text: str) -> None:
    """The message names what was given."""
    with pytest.raises(ConfigError, match=text):
        named(text)


def test_a_card_misspelt() -> None:
    """The message names the nearest one, and all."""
    with pytest.raises(ConfigError, match=r"did you mean rtx4090\? known: t4, .*b200"):
        named("rtx4091")


def test_a_model_that_is_not_there() -> None:
    """Neither folder nor recipe."""
    with pytest.raises(ModelError, match="no such model folder"):
        Planner(CARD).origin("./nowhere/at/all")
    assert main(["plan", "./nowhere/at/all"]) == ModelError.exit_code
    assert main(["plan", "nowhere.yaml"]) == ConfigError.exit_code


RECIPE = """
name: small
out: runs/small
prepare: {dump: none}
pretrain:
  fresh: {vocabulary: 300, context: 32, hidden_size: 16, layers: 1, heads: 2}
  block: 16
  batch_size: 2
sft: {block: 16, batch_size: 2, evaluation_rows: 4}
reward: {batch_size: 2, evaluation_pairs: 4}
ppo: {batch_size: 2, mini_batch_size: 2, response: {max_tokens: 4}}
evaluate: {prompts: 2, response: {max_tokens: 4}, evaluation_rows: 2}
"""


def test_recipe_whose_models_are_still_to_be_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the shape of the first one; sums add up; too small a card is exit code 8."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "plan.json"
    recipe.write_text(RECIPE, encoding="utf-8")
    command = ["plan", str(recipe), "--flops", "1e12", "--json", str(out)]
    assert main([*command, "--card", "24GB"]) == 0
    told = json.loads(out.read_text(encoding="utf-8"))
    assert [stage["name"] for stage in told["stages"]] == [
        "pretrain",
        "sft",
        "reward",
        "ppo",
        "evaluate",
    ]
    for stage in told["stages"]:
        totals = [phase["total"] for phase in stage["phases"] if not phase["on_host"]]
        assert stage["peak"]["bytes"] == max(totals)
        for phase in stage["phases"]:
            assert phase["total"] == sum(phase["parts"].values())
            assert all(size >= 0 for size in phase["parts"].values())
        assert stage["verdict"]["fits"]
    assert "sft.batch_size" in capsys.readouterr().out


def test_too_small_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 8, and what to change in the order in which to try."""
    out = tmp_path / "plan.json"
    rest = ["--reward", "null", "--ppo", "null", "--evaluate", "null", "--flops", "1e12"]
    command = ["plan", shape(tmp_path), *rest, "--sft.block", "16", "--json", str(out)]
    assert main([*command, "--card", "500MB"]) == 8
    assert "does not fit" in capsys.readouterr().err
    told = json.loads(out.read_text(encoding="utf-8"))
    assert not told["fits"]
    changes = told["stages"][0]["verdict"]["changes"]
    assert [change["key"] for change in changes][:2] == ["sft.batch_size", "sft.lora.r"]
