"""All checks together: sound models pass and are left as they were, faults are told at once."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from suasion.config.schema import CriticConfig, ResponseConfig
from suasion.core.errors import CheckError, ConfigError
from suasion.watch.suite import CHECKS, QUICK, run_checks
from tests.unit.watch.conftest import Build


@pytest.fixture
def console() -> Console:
    """One that keeps what it is told."""
    return Console(file=io.StringIO(), width=160)


def said(console: Console) -> str:
    """What the console was told."""
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("critic", ["value_head", "reward_model", "policy_copy"])
@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sound_models_pass(
    build: Build, console: Console, family: str, rank: int, critic: str
) -> None:
    """Every kind of policy stage; weights and random numbers are kept."""
    subject = build(family, rank, critic=CriticConfig(kind=critic))  # type: ignore[arg-type]
    before = {
        (part, name): tensor.clone()
        for part, module in subject.modules.items()
        for name, tensor in module.state_dict().items()
    }
    stream = torch.get_rng_state()
    findings = run_checks(subject, console=console)
    assert [finding.name for finding in findings] == list(CHECKS)
    assert [f.name for f in findings if not f.applies] == ["packing", "label"]
    assert torch.equal(torch.get_rng_state(), stream)
    assert not subject.parts.trainer.optimizer.state
    for part, module in subject.modules.items():
        assert all(parameter.grad is None for parameter in module.parameters())
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[part, name]), name


def test_faults_are_told_all_at_once(build: Build, console: Console) -> None:
    """One error, each fault with cause and remedy."""
    subject = build(response=ResponseConfig(max_tokens=12, top_k=4))
    subject.parts.policy.model.generation_config.min_length = 4
    with pytest.raises(CheckError) as raised:
        run_checks(subject, QUICK, console=console)
    message = str(raised.value)
    assert message.startswith("2 faults that would ruin the run:\n  sampler: top_k 4, top_p 1")
    assert "\n  stop: generation_config.json sets min_length 4" in message
    assert message.count("likely cause:") == message.count("fix:") == 2
    assert raised.value.exit_code == 8
    assert said(console).count("FAULT") == 2


def test_only_report(build: Build, console: Console) -> None:
    """No error, the same words."""
    subject = build(response=ResponseConfig(max_tokens=12, top_k=4))
    findings = run_checks(subject, ["sampler"], console=console, only_report=True)
    assert [finding.ok for finding in findings] == [False]
    assert "fix: set response.top_k 0" in said(console)


def test_brief(build: Build, console: Console) -> None:
    """One line where all is well, the table where it is not."""
    run_checks(build(), QUICK, console=console, brief=True)
    assert said(console).startswith("  checks ok in ")
    assert said(console).count("\n") == 1
    faulty = build(response=ResponseConfig(max_tokens=12, top_k=4))
    run_checks(faulty, ["sampler"], console=console, only_report=True, brief=True)
    assert "FAULT" in said(console)


def test_one_alone(build: Build, console: Console) -> None:
    """Nothing else runs."""
    subject = build(response=ResponseConfig(max_tokens=12, top_k=4))
    assert [f.name for f in run_checks(subject, ["modes"], console=console)] == ["modes"]


def test_unknown_name(build: Build, console: Console) -> None:
    """The nearest name, or all of them."""
    with pytest.raises(ConfigError, match="did you mean padding"):
        run_checks(build(), ["pading"], console=console)
    with pytest.raises(ConfigError, match="the checks are ratio, reference"):
        run_checks(build(), ["zzz"], console=console)


def test_markup_in_figures_is_text(build: Build, console: Console) -> None:
    """A template may have brackets that rich would read as a style."""
    subject = build()
    known = {**subject.templates, "sft": "[bold]{query}[/bold] {response}"}
    run_checks(replace(subject, templates=known), ["templates"], console=console, only_report=True)
    assert "'[bold]{query}[/bold] {response}'" in said(console)
