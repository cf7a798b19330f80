"""The choice of arithmetic: measured, safe, and the same again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from suasion.core.files import read_json
from suasion.models import arithmetic
from suasion.models.arithmetic import NARROW, Arithmetic, arithmetic_for, float32_products

CPU = torch.device("cpu")


def readings(**changes: float) -> dict[str, float]:
    """As on a processor where everything but torch's default back end is fast."""
    found = {
        f"{phase}/{kind}": rate
        for phase in ("training", "decoding")
        for kind, rate in (("highest", 200.0), ("medium", 450.0), ("bfloat16", 900.0))
    }
    return {**found, "error/highest": 2e-7, "error/medium": 3e-7, **changes}


def test_narrow_models_never_depend_on_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """So runs on them are equal byte for byte, on any machine."""
    monkeypatch.setattr(arithmetic, "measure", lambda _: pytest.fail("measured"))
    for precision in ("auto", "fp32"):
        found = arithmetic_for(precision, width=NARROW - 1, device=CPU)
        assert found == Arithmetic(precision)
        assert found.brief == "float32"


@pytest.mark.parametrize(
    ("precision", "changes", "expected"),
    [
        ("auto", {}, ("bfloat16", "medium", "medium")),
        ("fp32", {}, ("float32", "medium", "medium")),
        ("auto", {"training/bfloat16": 500.0}, ("float32", "medium", "medium")),
        ("auto", {"decoding/medium": 210.0}, ("bfloat16", "medium", "highest")),
        # The other back end rounds to bf16 here: fast, and not what float32 promises.
        ("fp32", {"error/medium": 2e-3}, ("float32", "highest", "highest")),
    ],
)
def test_choices(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    changes: dict[str, float],
    expected: tuple[str, str, str],
) -> None:
    """By what was measured, where it is safe."""
    monkeypatch.setattr(arithmetic, "measure", lambda _: readings(**changes))
    found = arithmetic_for(precision, width=768, device=CPU)
    assert (found.dtype, found.training, found.decoding) == expected


def test_the_choice_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A resumed stage goes on in the arithmetic it began with; another precision chooses anew."""
    monkeypatch.setattr(arithmetic, "measure", lambda _: readings())
    first = arithmetic_for("auto", width=768, device=CPU, folder=tmp_path)
    assert read_json(tmp_path / "arithmetic.json")["measured"]["training/medium"] == 450.0
    monkeypatch.setattr(arithmetic, "measure", lambda _: readings(**{"training/bfloat16": 1.0}))
    assert arithmetic_for("auto", width=768, device=CPU, folder=tmp_path) == first
    assert arithmetic_for("fp32", width=768, device=CPU, folder=tmp_path).dtype == "float32"


def test_it_really_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are positive, float32 errors are those of float32."""
    monkeypatch.setattr(arithmetic, "SECONDS", 0.002)
    found = arithmetic.measure(NARROW)
    assert all(value > 0 for value in found.values())
    assert found["error/highest"] < 1e-6


def test_products_are_given_back() -> None:
    """Also after an error."""
    before = torch.get_float32_matmul_precision()
    inside = []

    def fail() -> None:
        inside.append(torch.get_float32_matmul_precision())
        raise KeyError

    with pytest.raises(KeyError), float32_products("medium"):
        fail()
    assert inside == ["medium"]
    assert torch.get_float32_matmul_precision() == before
