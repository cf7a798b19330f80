"""An adapter merged into its base, and the proof that nothing changed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from suasion.config.schema import MergeConfig
from suasion.core.errors import ModelError, TrainingError
from suasion.core.files import read_json, storage_errors, write_json
from suasion.data.codec import Codec
from suasion.data.sources import Source, documents, spread
from suasion.models.load import (
    context_of,
    device_for_training,
    load_causal_lm,
    load_codec,
    load_reward_model,
    new_reward_model,
    save_model,
)

TEXTS = 32
"""Held-out texts that the model is compared on before and after."""


def merge(config: MergeConfig, folder: Path) -> dict[str, Any]:
    """Merge an adapter into its base in fp32, and compare what was saved with what was given.

    The saved model is loaded again from the disk, so the comparison is with what a user will load.
    Writes `model/`, a plain transformers folder, and `merge.json`. One model is in memory at a
    time; its logits wait on the disk.

    Returns:
        What `merge.json` holds: absolute differences of logits (of scores, for a classifier),
        largest and mean; for a language model the KL from the merged model to the adapter's, mean
        per token, nats; and `adapter_effect`, the largest difference that the adapter itself makes,
        beside which the others should be small.

    Raises:
        ModelError: the folder is no adapter, or its base is missing or does not fit it.
        TrainingError: a logit differs by more than the tolerance; no model is left behind.
        StorageError: the disk refused.
    """
    assert config.model is not None
    assert config.data is not None
    source = Path(config.model)
    settings = _adapter_settings(source)
    scores = settings["task_type"] == "SEQ_CLS"
    codec = load_codec(config.model, config.template)
    model = _with_adapter(source, str(settings["base_model_name_or_path"]), codec, scores=scores)
    context = context_of(model.get_base_model().config)
    rows = spread(Source(Path(config.data)).answers("evaluation", best=False), TEXTS)
    texts = [ids[:context] for ids in documents(codec, rows)]
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    with storage_errors(scratch):
        effect = _record(model, texts, scratch)
    save_model(
        scratch / "model", model.merge_and_unload(safe_merge=True), codec.tokenizer, config.template
    )
    del model
    found: dict[str, Any] = {
        "kind": "classifier" if scores else "causal_lm",
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "adapter_effect": effect,
        **_compare(str(scratch / "model"), texts, scratch, scores=scores),
        "tolerance": config.tolerance,
    }
    if not found["largest_difference"] <= config.tolerance:  # so written, NaN is refused too
        shutil.rmtree(scratch)
        raise TrainingError(
            f"{source}: merged, its logits differ by up to {found['largest_difference']:.3g}, "
            f"over the tolerance of {config.tolerance:g}; the adapter itself changes them by up to "
            f"{effect:.3g}",
            "raise merge.tolerance if that is small enough for you, or keep base and adapter apart",
        )
    with storage_errors(folder):
        shutil.rmtree(folder / "model", ignore_errors=True)
        (scratch / "model").rename(folder / "model")
    shutil.rmtree(scratch)
    write_json(folder / "merge.json", found)
    return found


def _adapter_settings(folder: Path) -> dict[str, Any]:
    """The adapter's own configuration, checked for what a merge needs."""
    if not (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file():
            beside = folder.parent / "adapter"
            hint = f"; its adapter is {beside}" if beside.is_dir() else ""
            raise ModelError(
                f"{folder} is a plain model already: there is no adapter to merge",
                f"use it as it is{hint}",
            )
        raise ModelError(
            f"{folder} is not an adapter: it has no adapter_config.json",
            "give the folder that a stage with lora.r above 0 wrote as adapter/",
        )
    settings = dict(read_json(folder / "adapter_config.json"))
    if settings.get("task_type") not in ("CAUSAL_LM", "SEQ_CLS"):
        raise ModelError(
            f"{folder}/adapter_config.json: task_type is {settings.get('task_type')!r}",
            "suasion merges adapters of language models (CAUSAL_LM) and of reward models (SEQ_CLS)",
        )
    if not settings.get("base_model_name_or_path"):
        raise ModelError(f"{folder}/adapter_config.json names no base_model_name_or_path")
    return settings


def _with_adapter(folder: Path, base: str, codec: Codec, *, scores: bool) -> Any:
    """The base in fp32 with the adapter on it, unmerged."""
    try:
        plain = (
            new_reward_model(base, codec.pad_id, torch.float32, seed=0)
            if scores
            else load_causal_lm(base)
        )
    except ModelError as error:
        raise ModelError(
            f"{folder} is an adapter on {base}, which cannot be loaded: {error.what}",
            "put the base back, or correct base_model_name_or_path in adapter_config.json",
        ) from error
    if scores:
        _require_head(folder)
    try:
        with warnings.catch_warnings():
            # peft only warns, and would go on with weights drawn at random.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(plain, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} does not fit its base {base}: {first}") from error
    return model.to(device_for_training()).eval()


def _require_head(folder: Path) -> None:
    """Refuse a reward model's adapter without its scoring head: another would be drawn."""
    weights = folder / "adapter_model.safetensors"
    try:
        with safe_open(weights, "pt") as tensors:
            names = list(tensors.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{weights}: cannot read the adapter's weights ({error})") from error
    if not any(part in ("score", "classifier") for name in names for part in name.split(".")):
        raise ModelError(
            f"{weights} has no scoring head",
            "save the adapter with the head among its modules_to_save",
        )


@torch.no_grad()
def _logits(model: Any, texts: list[list[int]]) -> Iterator[Tensor]:
    """Logits of one text after the other, [T, V] (of a classifier [1, labels]), on the CPU."""
    device = next(model.parameters()).device
    for text in texts:
        ids = torch.tensor([text], device=device)
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        yield found.float().cpu().reshape(-1, found.shape[-1])


def _record(model: Any, texts: list[list[int]], scratch: Path) -> float:
    """Write the logits of each text; return the most that the adapter changes any of them."""
    scratch.mkdir(parents=True)
    for number, logits in enumerate(_logits(model, texts)):
        save_file({"logits": logits.contiguous()}, scratch / f"{number}.safetensors")
    effect = 0.0
    with model.disable_adapter():
        for number, logits in enumerate(_logits(model, texts)):
            given = load_file(scratch / f"{number}.safetensors")["logits"]
            effect = max(effect, float((logits - given).abs().max()))
    return effect


def _compare(
    saved: str, texts: list[list[int]], scratch: Path, *, scores: bool
) -> dict[str, float]:
    """Differences of the saved model's logits from the recorded ones."""
    model = load_reward_model(saved) if scores else load_causal_lm(saved)
    model.to(device_for_training()).eval()  # type: ignore[arg-type]
    largest, total, count, divergence, rows = 0.0, 0.0, 0, 0.0, 0
    for number, logits in enumerate(_logits(model, texts)):
        new = logits.double()
        old = load_file(scratch / f"{number}.safetensors")["logits"].double()
        difference = (new - old).abs()
        largest = float(torch.tensor([largest, float(difference.max())]).max())  # NaN stays
        total, count = total + float(difference.sum()), count + difference.numel()
        held_to = old.log_softmax(-1)
        divergence += float((held_to.exp() * (held_to - new.log_softmax(-1))).sum())
        rows += len(new)
    found = {"largest_difference": largest, "mean_difference": total / count}
    return found if scores else {**found, "kl": divergence / rows}
