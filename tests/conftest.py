"""What every test shares: shapes checked at run time, one thread, nothing downloaded."""

from __future__ import annotations

import os
import sys
import types

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# The hook wants an importable name; ints pass for floats, as PEP 484 says.
_checker = types.ModuleType("suasion_test_typechecker")
_checker.check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # type: ignore[attr-defined]
sys.modules.setdefault(_checker.__name__, _checker)

_installed_in_time = "suasion.functional.masking" not in sys.modules
install_import_hook("suasion.functional", f"{_checker.__name__}.check")

# Small tensors: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shapes_checked() -> bool:
    """Whether suasion.functional was imported under the hook."""
    return _installed_in_time
