"""From files and options to validated records, every mistake at once."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from suasion.cli.options import parse_stage
from suasion.config.load import merged, parse_overrides, read_yaml, validate
from suasion.config.recipe import load_recipe, resolve
from suasion.config.schema import (
    GenerateConfig,
    PpoConfig,
    Recipe,
    SftConfig,
)
from suasion.core.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed", "3"], {"seed": "3"}),
        (["--seed=3"], {"seed": "3"}),
        (
            ["--ppo.kl.coef", "1e-2", "--ppo.steps", "4"],
            {"ppo": {"kl": {"coef": "1e-2"}, "steps": "4"}},
        ),
        (["--ppo.batch-size", "4"], {"ppo": {"batch_size": "4"}}),
        (["--score", "-1.5"], {"score": "-1.5"}),
        (["--targets", "q", "v"], {"targets": ["q", "v"]}),
        (["--targets", "[q, v]"], {"targets": ["q", "v"]}),
        (["--sft", "null"], {"sft": None}),
        (["--lora", "{r: 4}"], {"lora": {"r": 4}}),
        (["--prompt", "Rice: how long?"], {"prompt": "Rice: how long?"}),
        (["--prompt", "42"], {"prompt": "42"}),
        (["--template", "{query}: {response}"], {"template": "{query}: {response}"}),
        (["--prompt", ""], {"prompt": ""}),
        (["--a=b=c"], {"a": "b=c"}),
    ],
)
def test_options_become_a_nested_mapping(words: list[str], expected: object) -> None:
    """Values stay text until the validator knows what they are for."""
    assert parse_overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed", "3"], "unexpected argument 'seed'"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "--out", "x"], "--seed needs a value"),
        (["--ppo", "x", "--ppo.steps", "3"], "ppo was already given a plain value"),
    ],
)
def test_options_of_another_form_are_refused(words: list[str], said: str) -> None:
    """With what they should look like."""
    with pytest.raises(ConfigError, match=said):
        parse_overrides(words)


def test_texts_become_what_an_option_is() -> None:
    """Numbers, truths, lists and nothing, from the command line's texts."""
    values = parse_overrides(
        shlex.split(
            "--learning_rate 1e-5 --steps 3 --score.scale true --kl.stop null --clip 1 "
            "--lora.targets q --track tensorboard --response.min_sampled 2"
        )
    )
    config = validate(PpoConfig, values, "the options")
    assert (config.learning_rate, config.steps, config.clip) == (1e-5, 3, 1.0)
    assert config.score.scale is True
    assert config.kl.stop is None
    assert config.lora.targets == ("q",)
    assert config.track == ("tensorboard",)
    assert config.response.min_sampled == 2
    assert validate(GenerateConfig, parse_overrides(["--prompt", "42"]), "o").prompt == "42"


def test_every_mistake_is_told_at_once() -> None:
    """Each with its path; a misspelled key with the nearest one."""
    values = {
        "name": "n",
        "ppo": {"kl": {"coeff": 1}, "clip": "x", "steps": 0},
        "sft": {"epochs": float("inf"), "lora": {"r": 2.5}},
        "evaluat": {},
    }
    with pytest.raises(ConfigError) as caught:
        validate(Recipe, values, "recipe.yaml")
    message = str(caught.value)
    assert message.startswith("7 mistakes in recipe.yaml:")
    for part in (
        "out: missing; give it in the recipe or as --out",
        "ppo.kl.coeff: unknown key; did you mean coef?",
        "ppo.clip: ",
        "(got 'x')",
        "ppo.steps: Input should be greater than 0 (got 0)",
        "sft.epochs: ",
        "sft.lora.r: ",
        "evaluat: unknown key; did you mean evaluate?",
    ):
        assert part in message, message


def test_a_key_like_no_other_is_told_what_there_is() -> None:
    """Nothing near: all valid keys."""
    with pytest.raises(ConfigError, match="valid keys: coef, adaptive, target, horizon"):
        validate(PpoConfig, {"kl": {"zzzzzz": 1}}, "options")


def test_overrides_are_laid_on_top() -> None:
    """Mapping by mapping; a null takes a stage away; the arguments are not edited."""
    base = {"a": {"b": 1, "c": 2}, "d": {"e": 3}}
    over = {"a": {"c": 4}, "d": None}
    assert merged(base, over) == {"a": {"b": 1, "c": 4}, "d": None}
    assert base == {"a": {"b": 1, "c": 2}, "d": {"e": 3}}


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: [", "line 1"), ("- 1", "not list"), ("", "file is empty"), ("\tx", "not valid YAML")],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, said: str) -> None:
    """Says what it is instead."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=said):
        read_yaml(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Or is a folder, or no text."""
    with pytest.raises(ConfigError, match="no such recipe"):
        read_yaml(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="not a YAML file"):
        read_yaml(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a YAML file"):
        read_yaml(tmp_path / "bytes")


WHOLE = """
name: whole
out: runs/x
prepare: {dump: d}
pretrain: {}
sft: {}
reward: {}
ppo: {}
evaluate: {}
"""


def recipe(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    """A recipe from text."""
    path = tmp_path / "recipe.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path, overrides)


def test_stages_take_what_those_before_them_leave(tmp_path: Path) -> None:
    """Every input is named in the resolved recipe."""
    found = recipe(tmp_path, WHOLE, "--ppo.reward", "my:reward")
    assert found.pretrain is not None
    assert found.sft is not None
    assert found.reward is not None
    assert found.ppo is not None
    assert found.evaluate is not None
    assert found.pretrain.text == "runs/x/prepare"
    assert (found.sft.model, found.sft.data) == ("runs/x/pretrain/model", "runs/x/prepare")
    assert found.reward.model == "runs/x/sft/model"
    assert (found.ppo.model, found.ppo.reward) == ("runs/x/sft/model", "my:reward")
    assert found.evaluate.before == "runs/x/sft/model"
    assert found.evaluate.after == "runs/x/ppo/model"
    assert found.evaluate.start == "runs/x/pretrain/start"
    assert resolve(found) == found


def test_one_template_goes_to_every_stage(tmp_path: Path) -> None:
    """It is one option of the recipe."""
    found = recipe(tmp_path, WHOLE, "--template", "{query} {response}")
    stages = (found.pretrain, found.sft, found.reward, found.ppo, found.evaluate)
    assert {stage.template for stage in stages if stage} == {"{query} {response}"}


def test_a_stage_without_its_input_is_refused(tmp_path: Path) -> None:
    """All that is missing, at once."""
    with pytest.raises(ConfigError, match=r"nothing gives ppo\.model, ppo\.reward, ppo\.data"):
        recipe(tmp_path, "name: n\nout: o\nppo: {}")


def test_a_stage_alone_has_out_seed_and_threads() -> None:
    """Beside its own options, and mistakes in either are told together."""
    call = parse_stage(SftConfig, "sft", shlex.split("--out o --seed 3 --threads 2 --block 8"))
    assert (call.out, call.seed, call.threads, call.config.block) == ("o", 3, 2, 8)
    assert call.config == SftConfig(block=8)
    with pytest.raises(ConfigError) as caught:
        parse_stage(SftConfig, "sft", shlex.split("--threads 0 --block x --bloc 3"))
    assert str(caught.value).startswith("4 mistakes in the options")


def test_the_shipped_recipes_are_valid() -> None:
    """Each file in recipes/, and the demo's."""
    root = Path(__file__).parents[3]
    for path in [*root.glob("recipes/*.yaml"), root / "src/suasion/cli/demo.yaml"]:
        values = yaml.safe_load(path.read_text("utf-8"))
        overrides = ["--prepare.dump", "d"] if "prepare" in values else []
        if not {"pretrain", "sft"} & values.keys():
            overrides += ["--ppo.model", "m"]
        load_recipe(path, overrides)
