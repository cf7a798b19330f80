"""The shapes in the signatures are checked while these tests run."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from suasion.functional import losses, masking


def test_shapes_are_checked(shapes_checked: bool) -> None:  # noqa: FBT001  a fixture
    """A mask of another shape, an integer mask and integer values are refused."""
    assert shapes_checked, "something imported suasion.functional before the import hook"
    x = torch.ones(2, 3)
    with pytest.raises(TypeCheckError):
        masking.masked_sum(x, torch.ones(2, 1).bool())
    with pytest.raises(TypeCheckError):
        masking.masked_sum(x, torch.ones(2, 3).long())
    with pytest.raises(TypeCheckError):
        losses.policy_gradient(x, torch.ones(2))
    with pytest.raises(TypeCheckError):
        losses.policy_gradient(x, torch.ones(2, 3).long())
