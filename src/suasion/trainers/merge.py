"""An adapter merged into its base, and the proof that nothing changed."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from suasion.config.schema import MergeConfig
from suasion.core.errors import DataError, ModelError, TrainingError
from suasion.core.files import read_json, storage_errors, write_json
from suasion.data.codec import Codec
from suasion.data.sources import PAIR, Source, documents, spread
from suasion.data.tables import read_table
from suasion.models.adapters import check_base, merged
from suasion.models.load import (
    context_of,
    device_for_training,
    load_causal_lm,
    load_codec,
    load_reward_model,
    new_reward_model,
    save_model,
)
from suasion.models.quantised import DTYPES
from suasion.trainers.reward import token_pairs

TEXTS = 32
"""Held-out texts that a language model is compared on before and after."""
LONGEST = 256
"""Tokens of each text that count: logits of whole long texts would fill disks."""
PAIRS = 64
"""Held-out pairs that a reward model is compared on."""
SHARE = 0.1
"""Of the adapter's own effect, by which a merge in 16 bits may differ unless a tolerance is set."""


def merge(config: MergeConfig, folder: Path) -> dict[str, Any]:
    """Merge an adapter into its base, and compare what was saved with what was given.

    The base is held as when the adapter was trained (in fp32, 16, 8 or 4 bits), and what it held is
    what the adapter is merged into, in fp32; only the sum is rounded, where `dtype` asks for that.
    The saved model is loaded again from the disk, so the comparison is with what a user will load.
    Writes `model/`, a plain transformers folder, and `merge.json`. One model is in memory at a
    time; its logits wait on the disk.

    Returns:
        What `merge.json` holds: absolute differences of logits (of scores, for a classifier),
        largest and mean; `adapter_effect`, the largest difference that the adapter itself makes,
        beside which the others should be small; for a language model the KL from the merged model
        to the adapter's, mean per token, nats; for a reward model the mean change of the score,
        and, on pairs, the accuracy before and after.

    Raises:
        ModelError: the folder is no adapter, or its base is missing, another, or does not fit it.
        TrainingError: a logit differs by more than the tolerance; no model is left behind.
        StorageError: the disk refused.
    """
    assert config.model is not None
    assert config.data is not None
    source, dtype = Path(config.model), DTYPES[config.dtype]
    settings = _adapter_settings(source)
    base, scores = str(settings["base_model_name_or_path"]), settings["task_type"] == "SEQ_CLS"
    codec = load_codec(config.model, config.template)
    held = check_base(source, base)
    model = _with_adapter(source, base, held, codec, scores=scores)
    context = context_of(model.get_base_model().config)
    texts, pairs = _texts(Source(Path(config.data)), codec, context, scores=scores)
    scratch = folder / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    with storage_errors(scratch):
        effect = _record(model, texts, scratch)
    # What fits the GPU in codes may not fit it in full precision.
    device = device_for_training() if held == "fp32" else torch.device("cpu")
    save_model(scratch / "model", merged(model.to(device), dtype), codec.tokenizer, config.template)
    del model
    compared = _compare(scratch, texts, dtype, device, scores=scores)
    found: dict[str, Any] = {
        "kind": "classifier" if scores else "causal_lm",
        "base_held": held,
        "dtype": config.dtype,
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "adapter_effect": effect,
        **compared.figures(),
        **(compared.pair_figures() if pairs else {}),
        "tolerance": _tolerance(config, effect),
    }
    if not found["largest_difference"] <= found["tolerance"]:  # so written, NaN is refused too
        shutil.rmtree(scratch)
        raise TrainingError(
            f"{source}: merged in {config.dtype}, its logits differ by up to "
            f"{found['largest_difference']:.3g}, over the tolerance of {found['tolerance']:.3g}; "
            f"the adapter itself changes them by up to {effect:.3g}",
            "merge in fp32, raise merge.tolerance if that is small enough for you, or keep base "
            "and adapter apart; the adapter is as it was",
        )
    with storage_errors(folder):
        shutil.rmtree(folder / "model", ignore_errors=True)
        (scratch / "model").rename(folder / "model")
    shutil.rmtree(scratch)
    write_json(folder / "merge.json", found)
    return found


def _tolerance(config: MergeConfig, effect: float) -> float:
    if config.tolerance is not None:
        return config.tolerance
    return 1e-3 if config.dtype == "fp32" else SHARE * effect


def _texts(
    source: Source, codec: Codec, context: int, *, scores: bool
) -> tuple[list[list[int]], bool]:
    """Texts to compare on, as tokens; for a reward model pairs, if there are any.

    Returns:
        The texts, and whether they are pairs: each chosen answer is then followed by the rejected.
    """
    longest = min(context, LONGEST)
    if scores and (pairs := _pairs(source)):
        rows = token_pairs(spread(pairs, PAIRS), codec, longest, "cut", str(source.path))
        return [p + answer for p, *both in rows for answer in both], True
    answers = spread(source.answers("evaluation", best=False), TEXTS)
    return [ids[:longest] for ids in documents(codec, answers)], False


def _pairs(source: Source) -> list[dict[str, Any]]:
    """Held-out pairs; none of a table that has another kind of rows."""
    path = source.file("evaluation", "pairs")
    try:
        return read_table(path, PAIR)
    except DataError:
        if source.prepared:
            raise
        return []  # reading its answers tells what is wrong with it


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


def _with_adapter(folder: Path, base: str, held: str, codec: Codec, *, scores: bool) -> Any:
    """The base as it was held with the adapter on it, unmerged; arithmetic is in fp32."""
    try:
        plain = (
            new_reward_model(base, codec.pad_id, torch.float32, seed=0, held=held)
            if scores
            else load_causal_lm(base, held=held)
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
    return model.to(device_for_training()).float().eval()


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


@dataclass
class _Compared:
    """Differences of the merged model's logits from the recorded ones, gathered text by text."""

    scores: bool
    largest: float = 0.0
    total: float = 0.0
    count: int = 0
    divergence: float = 0.0
    rows: int = 0
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def add(self, new: Tensor, old: Tensor) -> None:
        """Count one text: logits [T, V], or the score [1, labels]."""
        difference = (new - old).abs()
        self.largest = float(torch.tensor([self.largest, float(difference.max())]).max())  # NaN too
        self.total += float(difference.sum())
        self.count += difference.numel()
        self.rows += len(new)
        if self.scores:
            self.before.append(float(old[0, 0]))
            self.after.append(float(new[0, 0]))
        else:
            held_to = old.log_softmax(-1)
            self.divergence += float((held_to.exp() * (held_to - new.log_softmax(-1))).sum())

    def figures(self) -> dict[str, float]:
        """What every receipt has."""
        found = {"largest_difference": self.largest, "mean_difference": self.total / self.count}
        if not self.scores:
            return {**found, "kl": self.divergence / self.rows}
        change = sum(self.after) - sum(self.before)
        return {**found, "mean_score_change": change / len(self.after)}

    def pair_figures(self) -> dict[str, float]:
        """Accuracy on pairs, the first score of each being the chosen answer's."""
        return {
            "pairs": len(self.after) // 2,
            "pair_accuracy_before": _accuracy(self.before),
            "pair_accuracy_after": _accuracy(self.after),
        }


def _accuracy(scores: list[float]) -> float:
    right = [one > two for one, two in zip(scores[::2], scores[1::2], strict=True)]
    return sum(right) / len(right)


def _compare(
    scratch: Path,
    texts: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    scores: bool,
) -> _Compared:
    """The saved model beside what was recorded."""
    load = load_reward_model if scores else load_causal_lm
    model: Any = load(str(scratch / "model"), dtype)
    model.to(device).eval()
    found = _Compared(scores)
    for number, logits in enumerate(_logits(model, texts)):
        old = load_file(scratch / f"{number}.safetensors")["logits"]
        found.add(logits.double(), old.double())
    return found
