"""Everything a policy run needs to go on, in one folder: safetensors and JSON, no pickle.

Randomness needs no state: every generator is made anew from the seed, a name and the step.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from suasion.core.errors import DataError
from suasion.core.files import atomic_folder, file_hash, read_json, write_json

KEEP = 2
"""Checkpoints kept: the newest, and one to fall back on."""


def save_checkpoint(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step` atomically and drop the oldest.

    Args:
        folder: Holds all checkpoints of the run.
        step: Finished iterations.
        modules: What learns, by name; only parameters that learn and buffers are written.
        optimizer: Its state is split into tensors and plain values.
        schedule: A learning-rate schedule.
        state: Plain values: KL coefficient, running moments, ...
    """
    tensors = {
        f"{name}/{key}": tensor.detach().contiguous()
        for name, module in modules.items()
        for key, tensor in _learned(module).items()
    }
    optimizer_state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    shared: set[int] = set()
    for index, entries in optimizer_state["state"].items():
        for key, value in _flat(entries):
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = _unshared(value, shared)
            else:
                plain.setdefault(str(index), {})[key] = value
    target = folder / f"step-{step:08d}"
    with atomic_folder(target) as partial:
        save_file(tensors, partial / "state.safetensors")
        write_json(
            partial / "state.json",
            {
                "step": step,
                "state": dict(state),
                "optimizer": {"plain": plain, "param_groups": optimizer_state["param_groups"]},
                "schedule": {k: v for k, v in schedule.state_dict().items() if _is_plain(v)},
                "sha256": file_hash(partial / "state.safetensors"),
            },
        )
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        if re.fullmatch(r"step-\d{8}", old.name):
            shutil.rmtree(old)
    return target


def _unshared(tensor: Tensor, seen: set[int]) -> Tensor:
    """A tensor to save; a copy where others have its memory too, as tables of 8-bit optimizers."""
    at = tensor.untyped_storage().data_ptr()
    if at in seen:
        return tensor.detach().clone()
    seen.add(at)
    return tensor.detach().contiguous()


def load_newest(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> tuple[dict[str, Any] | None, list[str]]:
    """Restore the newest checkpoint that is whole.

    Returns:
        Its plain state with "step" (None if there is no usable checkpoint), and a message for each
        newer one that was refused.
    """
    refused: list[str] = []
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        if not re.fullmatch(r"step-\d{8}", candidate.name):
            continue
        try:
            return _load(candidate, modules, optimizer, schedule), refused
        except (DataError, SafetensorError, KeyError, OSError) as error:
            refused.append(f"{candidate} is damaged ({error}); using the one before it")
    return None, refused


def _load(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    schedule: Any,
) -> dict[str, Any]:
    stored = read_json(path / "state.json")
    if file_hash(path / "state.safetensors") != stored["sha256"]:
        raise DataError("its contents do not match their checksum")
    tensors = load_file(path / "state.safetensors")
    states: dict[int, dict[str, Any]] = {
        int(index): _deep(entries) for index, entries in stored["optimizer"]["plain"].items()
    }
    for key, tensor in tensors.items():
        room, _, rest = key.partition("/")
        if room == "optimizer":
            index, _, name = rest.partition("/")
            _put(states.setdefault(int(index), {}), name, tensor)
    for name, module in modules.items():
        learned = _learned(module)
        with torch.no_grad():
            for key, tensor in learned.items():
                tensor.copy_(tensors[f"{name}/{key}"])
    optimizer.load_state_dict(
        {"state": states, "param_groups": stored["optimizer"]["param_groups"]}
    )
    schedule.load_state_dict({**schedule.state_dict(), **stored["schedule"]})
    return {"step": int(stored["step"]), **stored["state"]}


def _flat(entries: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """A parameter's state by path; that of 8-bit optimizers has mappings inside."""
    for key, value in entries.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}/")
        else:
            yield f"{above}{key}", value


def _put(entries: dict[str, Any], path: str, value: Any) -> None:
    *above, key = path.split("/")
    for name in above:
        entries = entries.setdefault(name, {})
    entries[key] = value


def _deep(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What `_flat` took apart."""
    found: dict[str, Any] = {}
    for path, value in entries.items():
        _put(found, path, value)
    return found


def _learned(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, each once (tied weights share one entry)."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _is_plain(value: Any) -> bool:
    """Whether JSON gives it back as it was; a schedule made of schedules has nested states."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(_is_plain(inner) for inner in value)
    return isinstance(value, int | float | str | bool | None)
