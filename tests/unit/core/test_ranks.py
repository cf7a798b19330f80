"""What a process knows of the others; the rest needs several (tests/integration/test_ranks.py)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from suasion.cli.main import main
from suasion.cli.stages import run_stage
from suasion.config.schema import MergeConfig
from suasion.core.errors import ConfigError, TrainingError
from suasion.core.manifest import flat
from suasion.core.ranks import ALONE, Ranks, check_size, checksum, joined, launched


class Played(Ranks):
    """One of several processes, the others of which are played."""

    others: tuple[Any, ...] = ()

    def gather(self, value: Any) -> list[Any]:
        """Ours first."""
        return [value, *self.others]


def played(*others: object) -> Ranks:
    """The first process, and what the others give when all are asked."""
    ranks = Played(0, 1 + len(others))
    object.__setattr__(ranks, "others", others)
    return ranks


def test_alone() -> None:
    """Everything is one's own."""
    assert ALONE.first
    assert ALONE.own([5, 6, 7]) == [5, 6, 7]
    assert ALONE.gather("a") == ["a"]
    assert ALONE.share(lambda: 3) == 3
    assert ALONE.each_row(3, lambda rows: [10 * row for row in rows]) == [0, 10, 20]
    assert ALONE.each_row(0, lambda rows: rows) == []
    assert ALONE.sum(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    ALONE.barrier()
    ALONE.agree("anything", 1)


@pytest.mark.parametrize("count", range(8))
def test_each_row_belongs_to_one_process(count: int) -> None:
    """No row twice, none forgotten, none given to a process that is not there."""
    shares = [Ranks(rank, 3).own(range(count)) for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_results_come_in_the_order_of_rows() -> None:
    """Whoever worked on them, and though one had nothing to do."""

    def work(rows: list[int]) -> list[str]:
        return ["abcde"[row] for row in rows]

    assert played(["b", "e"], ["c"]).each_row(5, work) == list("abcde")
    assert played([]).each_row(1, work) == ["a"]


def test_tokens_of_all_processes() -> None:
    """One that had no rows has no tokens either."""
    ours, theirs = {"x": torch.tensor([1.0])}, {"x": torch.tensor([2.0, 3.0])}
    assert played(theirs, {}).concatenated(ours)["x"].tolist() == [1.0, 2.0, 3.0]
    assert ALONE.concatenated(ours)["x"].tolist() == [1.0]


def test_disagreement_is_an_error() -> None:
    """It says what, and who."""
    played(4, 4).agree("the step", 4)
    with pytest.raises(TrainingError, match="the step differs between processes: 4 in process 0, "):
        played(4, 3).agree("the step", 4, "share a folder")


def test_processes_with_other_options_stop_before_they_begin(tmp_path: Path) -> None:
    """By the option's whole name; where each finds its inputs is its own matter."""
    config = MergeConfig(model="here", tolerance=0.5)
    other = {**flat(asdict(MergeConfig(model="there", tolerance=0.25))), "seed": "1"}
    del other["model"], other["data"]
    with pytest.raises(ConfigError, match=r"merge.tolerance is 0.5 in process 0 and 0.25 in"):
        run_stage(
            "merge",
            config,
            tmp_path / "out",
            seed=1,
            console=Console(quiet=True),
            ranks=played(other),
        )
    assert not (tmp_path / "out").exists()


def test_checksums_tell_weights_apart() -> None:
    """By a single value, a sign, or two that changed places between tensors of other size."""
    weights = [torch.linspace(-1, 1, 7), torch.ones(2, 2)]
    base = checksum(weights)
    assert checksum([each.clone() for each in weights]) == base
    for other in ([weights[0], weights[1] + 1e-6], [-weights[0] + 0.5, weights[1]]):
        assert checksum(other) != base
    assert checksum([]) == checksum([torch.zeros(3)])


@pytest.mark.parametrize(("said", "count"), [({}, 1), ({"WORLD_SIZE": "1"}, 1)])
def test_how_many_were_started(said: dict[str, str], count: int) -> None:
    """As launchers say it."""
    assert launched(said) == count
    assert launched({"WORLD_SIZE": "3", "OMPI_COMM_WORLD_SIZE": "3"}) == 3


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "each process would train by itself"),
    ],
)
def test_a_launcher_that_makes_no_sense(said: dict[str, str], message: str) -> None:
    """Or that torch cannot hear: several runs that know nothing of each other."""
    with pytest.raises(ConfigError, match=message):
        launched(said)


def test_half_an_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Instead of a run alone that was meant to be one of two."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="WORLD_SIZE is 2, but RANK, MASTER_ADDR"), joined():
        pass
    assert main(["report", "no-such-run"]) == ConfigError.exit_code
    assert "torchrun" in capsys.readouterr().err


def test_a_group_of_another_size_is_refused() -> None:
    """What the environment says must be what came together."""
    check_size(2, 2)
    with pytest.raises(ConfigError, match="says 2 processes, the process group has 1"):
        check_size(2, 1)
