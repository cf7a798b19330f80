"""Correctness against float64, then speed beside the library's own way: `benchmarks/gpu/run.sh`.

    python -m benchmarks.gpu [--dry]

The table comes last. If OUT is set, benchmarks-gpu.md and benchmarks-gpu.json are written there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "accelerate", "peft", "pydantic", "jaxtyping", "scipy")
LIMIT = 500
"""Seconds after which nothing new is begun."""


def missing() -> list[str]:
    """What has to be installed first."""
    return [name for name in NEEDED if find_spec(name) is None]


def made(device: Any) -> dict[str, str]:
    """When and where."""
    import torch

    name = torch.cuda.get_device_name() if device.type == "cuda" else "processor (dry run)"
    found = {"date": datetime.now(UTC).date().isoformat(), "device": name}
    for package in ("torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def main(arguments: Sequence[str]) -> int:
    """Check, measure, print; 1 if something is wrong, 2 if something is missing."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="on the processor, on tiny models")
    given = parser.parse_args(arguments)
    lacking = missing()
    if lacking:
        print(
            f"missing: {', '.join(lacking)}; unpack their wheels somewhere and name that folder "
            "in PYTHONPATH"
        )
        return 2
    import torch

    from benchmarks.gpu.correct import faults
    from benchmarks.gpu.measure import DRY, SHAPES, ceilings, measurements

    if not given.dry and not torch.cuda.is_available():
        print("there is no GPU here; --dry runs on the processor")
        return 2
    device = torch.device("cpu" if given.dry else "cuda")
    began = time.monotonic()
    checked, wrong = faults(device)
    for line in checked:
        print(line)
    if wrong:
        print(f"{wrong} of {len(checked)} wrong: nothing is measured")
        return 1
    record: dict[str, Any] = {"made": made(device), "checks": checked}
    record["ceilings"] = ceilings(device, size=256 if given.dry else 8192)
    record["rows"] = []
    shapes = [DRY] if given.dry else SHAPES
    rows = (
        row for s in shapes for row in measurements(s, device, record["ceilings"]["bf16 flops"])
    )
    try:
        for row in rows:
            record["rows"].append(row)
            print(f"{time.monotonic() - began:6.0f} s  {json.dumps(row)}", flush=True)
            if time.monotonic() - began > LIMIT:
                break
    except KeyboardInterrupt:  # run.sh ends what takes too long
        print("time is up", flush=True)
    finally:
        record["made"]["seconds"] = f"{time.monotonic() - began:.0f}"
        write(record)
    return 0


def write(record: dict[str, Any]) -> None:
    """Print the page, and keep it where OUT says."""
    from benchmarks.gpu.page import markdown

    text = markdown(record)
    out = os.environ.get("OUT")
    if out:
        Path(out).mkdir(parents=True, exist_ok=True)
        Path(out, "benchmarks-gpu.md").write_text(text, encoding="utf-8")
        Path(out, "benchmarks-gpu.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
