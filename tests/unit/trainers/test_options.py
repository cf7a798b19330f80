"""Optimizers, schedules and losses as recipes name them: they run, resume, and refuse clearly."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from suasion.cli.build import ppo_parts
from suasion.cli.build_update import (
    IN_LOSS,
    IN_REWARD,
    losses_of,
    optimizer_of,
    placement_note,
    schedule_of,
    settings_of,
)
from suasion.cli.main import main
from suasion.config.load import validate
from suasion.config.schema import KlConfig, PpoConfig
from suasion.core.errors import ConfigError
from suasion.trainers.ppo import PpoLoop
from tests.integration.launch import POLICY, rows_of, world

STEPS = 3
LION = "tests.unit.trainers.lion:Lion"
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("torch.optim:SGD", {"momentum": 0.9, "nesterov": True}),
    "plain sgd": ("torch.optim:SGD", {}),
    "adam": ("torch.optim:Adam", {"betas": [0.8, 0.9], "amsgrad": True}),
    "adamw": ("torch.optim:AdamW", {"weight_decay": 0.1}),
    "lion": (LION, {"betas": [0.9, 0.98]}),
    "adam, 8 bits": ("bitsandbytes.optim:Adam8bit", {"min_8bit_size": 16}),
}
EXPONENTIAL = "torch.optim.lr_scheduler:ExponentialLR"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, prompts and a reward."""
    return world(tmp_path_factory.mktemp("options"))


def config_of(**options: Any) -> PpoConfig:
    """A policy stage, as a recipe gives it."""
    given = {**POLICY, "steps": STEPS, "samples": 0, "critic": {}, "optimizer_options": {}}
    return validate(PpoConfig, {**given, **options}, "recipe")


Run = Callable[..., tuple[PpoLoop, list[dict[str, Any]]]]


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Run:
    """(**options) -> the loop after its run, and its metrics."""
    count = itertools.count()

    def made(folder: Path | None = None, **options: Any) -> tuple[PpoLoop, list[dict[str, Any]]]:
        config = config_of(
            model=str(place / "model"),
            data=str(place / "rows.jsonl"),
            reward=f"{place / 'judge.py'}:reward",
            **options,
        )
        out = folder or tmp_path / str(next(count))
        out.mkdir(exist_ok=True)
        with torch.random.fork_rng():
            parts = ppo_parts(config, seed=1)
        console = Console(file=io.StringIO())
        loop = PpoLoop(parts, config, folder=out, seed=1, console=console, log=lambda *_: None)
        loop.run()
        return loop, rows_of(out / "metrics.jsonl")

    return made


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_by_its_import_path(run: Run, tmp_path: Path, name: str) -> None:
    """It learns under a falling rate; stopped and continued, it ends at the same weights."""
    path, options = OPTIMIZERS[name]
    if find_spec(path.partition(".")[0]) is None:
        pytest.skip(f"{name} needs the extra `quant`")
    chosen = {
        "optimizer": path,
        "optimizer_options": options,
        "schedule": EXPONENTIAL,
        "schedule_options": {"gamma": 0.5},
    }
    loop, rows = run(**chosen)
    optimizer = loop.parts.trainer.optimizer
    assert type(optimizer).__name__ == path.rpartition(":")[2]
    for key, value in options.items():
        if key in optimizer.param_groups[0]:
            assert optimizer.param_groups[0][key] == (
                tuple(value) if isinstance(value, list) else value
            )
    rate = 1e-3
    assert [row["ppo/learning_rate"] for row in rows] == pytest.approx(
        [rate / 2, rate / 4, rate / 8]
    )
    assert rows[-1]["ppo/policy/approxkl"] > 0
    run(tmp_path / "part", **chosen, steps=STEPS - 1)
    resumed, _ = run(tmp_path / "part", **chosen)
    whole = dict(loop.parts.policy.trainable())
    for key, value in resumed.parts.policy.trainable():
        assert torch.equal(value, whole[key]), key


def test_a_schedule_of_schedules_is_resumed(run: Run, tmp_path: Path) -> None:
    """Its state has states inside."""
    chosen = {"schedule": "tests.unit.trainers.test_options:two_schedules"}
    _, whole = run(**chosen)
    run(tmp_path / "part", **chosen, steps=STEPS - 1)
    _, resumed = run(tmp_path / "part", **chosen)
    rates = [row["ppo/learning_rate"] for row in whole]
    assert rates == [row["ppo/learning_rate"] for row in resumed]
    assert rates == pytest.approx([5e-4, 1e-3, 1e-4])


def two_schedules(optimizer: torch.optim.Optimizer) -> Any:
    """Half the rate for two iterations, then a falling one."""
    kinds = torch.optim.lr_scheduler
    parts = [kinds.ConstantLR(optimizer, 0.5, 2), kinds.ExponentialLR(optimizer, 0.1)]
    return kinds.SequentialLR(optimizer, parts, milestones=[2])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_named_schedules(name: str) -> None:
    """With a warm-up and, where it falls, a floor."""
    floor = {} if name == "constant" else {"floor": 0.1}
    config = config_of(steps=5, schedule=name, schedule_options={"warmup": 1, **floor})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = schedule_of(config, optimizer)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:2] == [0.5, 1.0]
    assert rates[-1] == pytest.approx(1.0 if name == "constant" else 0.1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer": "torch.optim:Adm"}, "has no function 'Adm'"),
        ({"optimizer": "no.such:Thing"}, "cannot import no.such:Thing"),
        (
            {"optimizer": "tests.unit.trainers.lion:not_an_optimizer"},
            "ppo.optimizer tests.unit.trainers.lion:not_an_optimizer is not a torch optimizer",
        ),
        (
            {"optimizer_options": {"betaz": [0.9, 0.9]}},
            "betaz: torch.optim:AdamW has no such option\n  -> did you mean betas?",
        ),
        ({"optimizer_options": {"betas": [2.0, 0.9]}}, "ppo.optimizer_options: Invalid beta"),
        ({"optimizer_options": {"lr": 1.0}}, "ppo.optimizer_options.lr: it is set by suasion"),
        ({"optimizer_options": {"eps": "tiny"}}, "ppo.optimizer or ppo.optimizer_options: "),
        ({"schedule": "linaer"}, "ppo.schedule linaer: there is no such schedule"),
        ({"schedule": "constant", "schedule_options": {"floor": 0.1}}, "it has warmup"),
        ({"schedule": "linear", "schedule_options": {"warmup": 3}}, "whole number in 0..2"),
        ({"schedule": EXPONENTIAL}, "ppo.schedule or ppo.schedule_options: "),
        ({"schedule": EXPONENTIAL, "schedule_options": {"gama": 0.9}}, "did you mean gamma?"),
        ({"schedule": "builtins:print"}, "is not a torch learning-rate schedule"),
        (
            {"schedule": "torch.optim.lr_scheduler:ReduceLROnPlateau"},
            "ReduceLROnPlateau wants a measurement at each step",
        ),
        ({"kl": {"in_loss": "k2", "estimator": "k3"}}, "ppo.kl.in_loss k2 takes it out of there"),
        (
            {"kl": {"in_loss": "k3"}, "reference": {"kind": "none"}},
            "ppo.kl.in_loss k3 holds the policy to a reference, and ppo.reference.kind is none",
        ),
        ({"score": {"overlong": 11}}, "overlong 11 is more than ppo.response.max_tokens 10"),
    ],
)
def test_what_cannot_be_built_says_which_key(
    place: Path, options: dict[str, Any], said: str
) -> None:
    """And, where a name is misspelled, what is near."""
    given = {"model": str(place / "model"), "data": str(place / "rows.jsonl")}
    config = config_of(**given, reward=f"{place / 'judge.py'}:reward", **options)
    with pytest.raises(ConfigError) as caught, torch.random.fork_rng():
        ppo_parts(config, seed=1)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optimizer_options": {"a": {"b": 1}}}, "optimizer_options: Value error, a must be"),
        ({"optimizer_options": 3}, "optimizer_options: "),
        ({"dual_clip": 1.0}, "dual_clip: "),
        ({"clip_high": 0.0}, "clip_high: "),
        ({"kl": {"in_loss": "k1"}}, "kl.in_loss: "),
        ({"critic": {"lam": 1.5}}, "critic.lam: "),
        ({"score": {"overlong": 0}}, "score.overlong: "),
    ],
)
def test_values_out_of_range(options: dict[str, Any], said: str) -> None:
    """Before anything is built."""
    with pytest.raises(ConfigError) as caught:
        config_of(**options)
    assert said in str(caught.value)


def test_texts_of_a_command_line_become_values() -> None:
    """Numbers, truths and lists."""
    given = {"eps": "1e-5", "momentum": "3", "nesterov": "true", "kind": "fast", "x": "null"}
    config = config_of(optimizer_options={**given, "betas": ["0.9", "1e-1"]})
    assert config.optimizer_options == {
        "eps": 1e-5,
        "momentum": 3,
        "nesterov": True,
        "kind": "fast",
        "x": None,
        "betas": (0.9, 0.1),
    }


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    """And the optimizer's options hold for both."""
    config = config_of(critic={"learning_rate": 0.5}, optimizer_options={"eps": 0.25})
    one, two = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = optimizer_of(config, [one], [two])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 0.5]
    assert [group["eps"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_clip_options_reach_the_loss() -> None:
    """A ratio of 1.5, of tokens to be made more likely and less likely."""
    old = torch.zeros(2, dtype=torch.float64)
    new = old + torch.log(torch.tensor(1.5, dtype=torch.float64))
    gains = torch.tensor([2.0, -2.0], dtype=torch.float64)

    def loss(**options: Any) -> list[float]:
        found: list[float] = losses_of(config_of(**options))[0](new, old, gains).tolist()
        return found

    assert loss(clip=0.2) == pytest.approx([-2.4, 3.0])
    assert loss(clip=0.2, clip_high=0.3) == pytest.approx([-2.6, 3.0])
    assert loss(clip=0.2, dual_clip=1.25) == pytest.approx([-2.4, 2.5])
    assert settings_of(config_of(clip_high=0.3)).clip_high == 0.3


def test_each_placement_says_what_it_optimises() -> None:
    """All but the default, which is right."""
    assert placement_note(KlConfig()) is None
    notes = [placement_note(KlConfig(estimator=name)) for name in ("abs", "k2", "k3")]
    notes += [placement_note(KlConfig(in_loss=name)) for name in ("k2", "k3")]
    assert all(note and note.startswith("ppo.kl.") for note in notes)
    assert set(IN_REWARD) == {"k1", "abs", "k2", "k3"}
    assert set(IN_LOSS) == {"k2", "k3"}


def test_a_run_says_it_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its start; the default has nothing to say."""
    words = ["ppo", "--model", place / "model", "--data", place / "rows.jsonl", "--track", "[]"]
    words += ["--reward", f"{place / 'judge.py'}:reward", "--steps", "2", "--samples", "0"]
    words += ["--batch_size", "4", "--mini_batch_size", "4", "--response.max_tokens", "4"]
    for name, told in (("k1", 0), ("k3", 1)):
        out = str(tmp_path / name)
        assert main([*map(str, words), "--out", out, "--kl.estimator", name]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert shown.count("never pays a token for having become rarer") == told


@pytest.mark.parametrize("kl", [{"estimator": "k3"}, {"estimator": "abs"}, {"estimator": "k2"}])
def test_a_biased_penalty_is_never_a_payment(run: Run, kl: dict[str, Any]) -> None:
    """k1 may be one: its mean over tokens has either sign, and that is what is right."""
    _, rows = run(kl={"coef": 0.5, "adaptive": False, **kl})
    assert rows[0]["ppo/mean_non_score_reward"] == pytest.approx(0.0, abs=1e-6)
    assert rows[-1]["ppo/mean_non_score_reward"] < 0
    assert rows[-1]["ppo/loss/kl"] == 0.0


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_a_penalty_in_the_loss(run: Run, name: str) -> None:
    """It leaves the reward, weighs by the coefficient, and holds the policy back."""
    kls = []
    for coef in (0.0, 3.0):
        _, rows = run(kl={"coef": coef, "adaptive": False, "in_loss": name}, epochs=8)
        kls.append(sum(row["ppo/policy/approxkl"] for row in rows))
        assert all(row["ppo/mean_non_score_reward"] == 0.0 for row in rows)
        assert all(row["objective/kl_coef"] == coef for row in rows)
        assert (rows[-1]["ppo/loss/kl"] > 0) == (coef > 0)
        row = rows[-1]
        whole = row["ppo/loss/policy"] + 0.1 * row["ppo/loss/value"] + row["ppo/loss/kl"]
        assert row["ppo/loss/total"] == pytest.approx(whole)
    assert kls[1] < kls[0]


def test_the_critics_own_lambda(run: Run) -> None:
    """With 1 its targets are the returns: their mean does not depend on what it said."""
    mean = [run(critic={"lam": lam})[1][0]["ppo/returns/mean"] for lam in (None, 0.95, 1.0)]
    assert mean[0] == mean[1]
    assert mean[1] != mean[2]
