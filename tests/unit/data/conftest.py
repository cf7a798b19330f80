"""A prepared small world, and the real dumps when there are any."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from suasion.data.scoring import DEFAULT_FRACTIONS, SPLITS
from suasion.data.stackexchange import Counts, prepare_stackexchange
from suasion.data.world import SITE, write_dump


@dataclass(frozen=True)
class Prepared:
    """A dump and what was made of it."""

    dump: Path
    out: Path
    counts: Counts

    def rows(self, table: str, *splits: str) -> list[dict[str, Any]]:
        """Rows of one table, of all splits unless some are named."""
        return [
            row
            for split in splits or SPLITS
            for row in pq.read_table(self.out / split / f"{table}.parquet").to_pylist()
        ]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """A small world of 1500 questions."""
    folder = tmp_path_factory.mktemp("world")
    write_dump(folder / "dump", seed=3, questions=1500)
    counts = prepare_stackexchange(
        folder / "dump", folder / "out", site=SITE, seed=3, fractions=DEFAULT_FRACTIONS
    )
    return Prepared(folder / "dump", folder / "out", counts)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data."""
    folder = os.environ.get("SUASION_REAL_DATA")
    if not folder:
        pytest.skip("SUASION_REAL_DATA does not name a folder of real dumps")
    return Path(folder)
