"""Where a saved value head may be, in our folders and in those of older libraries."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from suasion.classic.errors import ArgumentError
from suasion.core.files import read_json

HEAD_FILE = "value_head.safetensors"
_WEIGHT_FILES = (HEAD_FILE, "model.safetensors", "pytorch_model.bin", "value_head.bin")
_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_MARK = "v_head."


def read_head(source: str) -> dict[str, Tensor] | None:
    """Weights of the value head saved in `source`, by their names inside the head.

    Looks into `HEAD_FILE` first, then into the model's own weight files: the libraries of
    2023 saved `v_head.summary.weight` and `v_head.summary.bias` among the model's weights.

    Args:
        source: A folder, or a name on the Hub.

    Returns:
        None where there is no head.

    Raises:
        ArgumentError: there is a weight but no bias, or the other way round.
    """
    files = [path for name in _WEIGHT_FILES if (path := _file(source, name))]
    for name in _INDEX_FILES:
        if index := _file(source, name):
            shards = read_json(index)["weight_map"]
            wanted = sorted({shard for key, shard in shards.items() if _MARK in key})
            files += [path for shard in wanted if (path := _file(source, shard))]
    found: dict[str, Tensor] = {}
    for path in files:
        for key, tensor in _head_tensors(path).items():
            found.setdefault(key, tensor)
    if not found:
        return None
    missing = {"summary.weight", "summary.bias"} - found.keys()
    if missing:
        raise ArgumentError(
            f"{source}: the saved value head has no {' and no '.join(sorted(missing))}",
            "save the model again with save_pretrained",
        )
    return {name: found[name] for name in ("summary.weight", "summary.bias")}


def _head_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of the head in one file, without reading the others where the format allows."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as content:
            return {_bare(k): content.get_tensor(k) for k in content.keys() if _MARK in k}  # noqa: SIM118
    # Only tensors: a pickle may otherwise run anything.
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {_bare(key): value for key, value in state.items() if _MARK in key}


def _bare(key: str) -> str:
    return key.rpartition(_MARK)[2]


def _file(source: str, name: str) -> Path | None:
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None
