"""Messages, exit codes and streams of random numbers."""

from __future__ import annotations

import pytest
import torch

from suasion.core import errors
from suasion.core.seeding import generator, seed_of

CODES: dict[type[errors.SuasionError], int] = {
    errors.SuasionError: 1,
    errors.ConfigError: 2,
    errors.DataError: 3,
    errors.ModelError: 4,
    errors.RewardError: 5,
    errors.TrainingError: 6,
    errors.StorageError: 7,
}


@pytest.mark.parametrize("kind", CODES)
def test_each_error_has_its_exit_code(kind: type[errors.SuasionError]) -> None:
    """They are public: scripts test for them."""
    assert kind("what").exit_code == CODES[kind]
    assert issubclass(kind, errors.SuasionError)


def test_exit_codes_differ() -> None:
    """Each class has its own, and the table in the docstring has it too."""
    kinds: list[type[errors.SuasionError]] = [
        errors.SuasionError,
        *errors.SuasionError.__subclasses__(),
    ]
    assert len({kind.exit_code for kind in kinds}) == len(kinds)
    for kind in kinds[1:]:
        assert f"exit code {kind.exit_code}" in str(errors.__doc__)


def test_a_message_ends_with_what_to_do() -> None:
    """Where there is something to say."""
    assert str(errors.DataError("line 3 is cut off", "download it again")) == (
        "line 3 is cut off\n  -> download it again"
    )
    assert str(errors.DataError("no such file")) == "no such file"


def test_a_stream_is_a_function_of_its_name() -> None:
    """Pinned: a change would change every run."""
    assert seed_of(1, "rollout", 7) == 8670598606045677497
    assert seed_of(1, "rollout", 7) != seed_of(1, "rollout", 8)
    assert seed_of(1, "a", "b") != seed_of(1, "ab")
    assert seed_of(1, 23) != seed_of(12, 3)
    assert 0 <= seed_of(3, "x") < 2**63


def test_generators_are_independent_of_each_other() -> None:
    """And of the global one."""
    torch.manual_seed(0)
    one = torch.rand(4, generator=generator(1, "a"))
    torch.manual_seed(9)
    generator(1, "b")
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), one)
    assert not torch.equal(torch.rand(4, generator=generator(1, "b")), one)
