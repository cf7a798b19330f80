"""GPT-NeoX-20B's shape on a 24 GB card: the three steps with every role on one int8 base.

    python -m benchmarks.gpu.neox20b                    # the shape itself, on a GPU, within 24 GiB
    python -m benchmarks.gpu.neox20b --shape 1b         # the same code on a processor

Weights are random and made as int8 codes layer by layer, where they will be used: 40 GB of 16-bit
weights are never anywhere. All else is suasion's own: the stages `sft`, `reward` and `ppo` run as
they do from the command line, only what they would read from a folder is handed to them. Between
the first and the second the supervised adapter is merged, in 16 bits, and the result held in int8.
Prints the peak of each phase, and what it is made of.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPTNeoXConfig

from suasion.cli.build import ppo
from suasion.cli.commands import quiet_libraries
from suasion.config.schema import (
    QUESTION_ANSWER,
    CriticConfig,
    LoraConfig,
    PpoConfig,
    ResponseConfig,
    RewardConfig,
    SftConfig,
)
from suasion.core.files import keep_json_lines, write_json
from suasion.models.adapters import merged
from suasion.models.frozen import FrozenLinear, WideHead
from suasion.models.load import SIDECAR, device_for_training, score_head, train_tokenizer
from suasion.models.quantised import hold, plain_layers
from suasion.trainers.reward import reward
from suasion.trainers.sft import sft

MMAP_THRESHOLD = -3
"""The C library's name for the size from which it returns memory (malloc.h)."""
CARD = 24 << 30
"""Bytes of the card."""
SPREAD = 0.02
"""Standard deviation of the random weights."""
SHAPES: dict[str, dict[str, int]] = {
    "20b": {"hidden_size": 6144, "layers": 44, "heads": 64, "vocabulary": 50432},
    "1b": {"hidden_size": 2048, "layers": 16, "heads": 8, "vocabulary": 50304},
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 4, "vocabulary": 512},
}
"""GPT-NeoX-20B (arXiv 2204.06745), the billion-parameter member of the same family (arXiv
2304.01373), and something for the tests."""
STAGES = "suasion.trainers.sft", "suasion.trainers.reward", "suasion.cli.build_roles"


@dataclass(frozen=True)
class Phase:
    """What one phase needed. Bytes."""

    name: str
    peak: int
    """Most memory held at one moment: resident on a processor, allocated on a GPU."""
    learns: int
    """Weights that learn, their gradients and the optimizer's two moments."""
    adapters: int
    """Adapters that do not learn in this phase."""
    seconds: float


class Meter:
    """Peaks by phase.

    Args:
        device: Where the model is.
        base: Looked at after each phase, for the size of the adapter on it.
    """

    def __init__(self, device: torch.device, base: Any) -> None:
        self._device = device
        self._base = base
        self._adapter = 0
        self.phases: list[Phase] = []

    @contextmanager
    def phase(self, name: str, *, learn: int, idle: int) -> Iterator[None]:
        """Measure what happens inside, with so many adapters that learn and that do not."""
        _forget_peak(self._device)
        begun = time.perf_counter()
        yield
        seconds, peak = time.perf_counter() - begun, peak_bytes(self._device)
        names = ((n, p) for n, p in self._base.named_parameters() if ".default." in n)
        self._adapter = sum(p.nbytes for _, p in names) or self._adapter
        # A weight that learns has a gradient and two moments, all in fp32.
        sizes = (4 * learn * self._adapter, idle * self._adapter)
        self.phases.append(Phase(name, peak, *sizes, seconds))
        gc.collect()


def peak_bytes(device: torch.device) -> int:
    """Most bytes held since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # Linux


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def random_base(shape: dict[str, int], device: torch.device, folder: Path) -> Any:
    """The causal LM in int8, its embeddings, norms and output head in bf16.

    Args:
        shape: One of `SHAPES`.
        device: Where it is made.
        folder: Gets configuration and tokenizer, which the stages read.
    """
    tokenizer = train_tokenizer(["Question: how long?\n\nAnswer: not long at all."], 290)
    config = GPTNeoXConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        intermediate_size=4 * shape["hidden_size"],
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.bfloat16,
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / SIDECAR, {"template": QUESTION_ANSWER})
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, layer in plain_layers(model):
        model.set_submodule(name, _random_codes(layer, device))
    for module in model.modules():
        if not isinstance(module, FrozenLinear):
            _fill(module, device)
    model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config).to(device)
    model.name_or_path = str(folder)
    return hold(model, "int8")


def _random_codes(layer: Any, device: torch.device) -> FrozenLinear:
    shape = (layer.out_features, layer.in_features)
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scale = torch.full((shape[0],), SPREAD / (127 / 3**0.5), device=device)
    bias = torch.zeros(shape[0], dtype=torch.bfloat16, device=device)
    return FrozenLinear(codes, scale, bias, shape, "int8")


def _fill(module: nn.Module, device: torch.device) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        real = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if parameter.dim() > 1:
            real.normal_(std=SPREAD)
        else:
            real.fill_(1.0 if name == "weight" else 0.0)
        setattr(module, name, nn.Parameter(real, requires_grad=False))


def classifier_on(base: Any) -> Any:
    """A reward model over the very trunk of `base`, with a scalar head of its own."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.device("meta"):
        model: Any = AutoModelForSequenceClassification.from_config(config)
    model.gpt_neox = base.gpt_neox
    head = nn.Linear(base.config.hidden_size, 1, bias=False, device=base.device)
    nn.init.normal_(head.weight, std=1 / (base.config.hidden_size + 1) ** 0.5)
    model.score = head
    WideHead.on(model, score_head(model))
    model.name_or_path = base.name_or_path
    return model.requires_grad_(requires_grad=False)


def take_adapters_off(base: Any) -> None:
    """Leave the base as it was before a stage put adapters on it."""
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            base.set_submodule(name, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def run(shape: str, folder: Path, *, console: Console) -> tuple[Any, list[Phase], int]:
    """All phases. Returns the base, what each phase needed, and the bytes held before the first."""
    device = device_for_training()
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / total), device)
    texts, pairs, queries = _tables(folder)
    before = 0 if device.type == "cuda" else _status("VmRSS")
    _forget_peak(device)
    base = random_base(SHAPES[shape], device, folder / "base")
    meter = Meter(device, base)
    meter.phases.append(Phase("base made", peak_bytes(device), 0, 0, 0.0))
    # The targets and the rank of the published run on this model.
    lora = LoraConfig(
        r=16, base="int8", targets=("query_key_value",), checkpointing=True, merge=False
    )
    source, common = str(folder / "base"), {"precision": "bf16", "track": ()}
    steps = {"max_steps": 1, "batch_size": 2, "log_every": 1, "save_every": 1000}
    with meter.phase("sft", learn=1, idle=0), _given("trainers.sft.load_causal_lm", lambda: base):
        supervised = SftConfig(model=source, data=texts, lora=lora, block=64, **steps, **common)
        sft(supervised, folder / "sft", seed=1, console=console)
    take_adapters_off(base)
    with meter.phase("merge", learn=0, idle=1):
        on = PeftModel.from_pretrained(base, str(folder / "sft" / "adapter"))
        merged(on, torch.bfloat16, held="int8")
        del on
    with (
        meter.phase("reward", learn=1, idle=0),
        _given("trainers.reward.new_reward_model", classifier_on, base),
    ):
        judge = RewardConfig(model=source, data=pairs, lora=lora, **steps, **common)
        reward(judge, folder / "reward", seed=1, console=console)
    take_adapters_off(base)
    with (
        meter.phase("ppo", learn=2, idle=1),
        _given("cli.build_roles.load_causal_lm", lambda: base),
    ):
        ppo(_ppo(source, folder, queries, lora), folder / "ppo", seed=1, console=console)
    return base, meter.phases, before


def _ppo(source: str, folder: Path, queries: str, lora: LoraConfig) -> PpoConfig:
    """Policy, critic, reward model and reference on one base."""
    return PpoConfig(
        model=source,
        reward=str(folder / "reward" / "adapter"),
        data=queries,
        shared_base=True,
        critic=CriticConfig(kind="reward_model"),
        lora=lora,
        steps=1,
        batch_size=4,
        mini_batch_size=4,
        micro_batch_tokens=128,
        epochs=1,
        response=ResponseConfig(max_tokens=8),
        samples=0,
        save_every=1000,
        checks="off",
        precision="bf16",
        track=(),
    )


@contextmanager
def _given(name: str, make: Callable[..., Any], *given: Any) -> Iterator[None]:
    """Hand a stage the model that it would load."""
    with patch(f"suasion.{name}", lambda *_, **__: make(*given)):
        yield


def _tables(folder: Path) -> tuple[str, str, str]:
    """Texts, pairs and queries to run on."""
    answer = " It is longer than one would think, and shorter than one would fear."
    rows: dict[str, list[dict[str, str]]] = {
        "texts": [{"query": f"How long is {n}?", "response": answer} for n in range(40)],
        "pairs": [
            {"query": f"How long is {n}?", "chosen": answer, "rejected": " No."} for n in range(8)
        ],
        "queries": [{"query": f"How long is {n}?"} for n in range(8)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        keep_json_lines(folder / f"{name}.jsonl", lines)
    texts, pairs, queries = (str(folder / f"{name}.jsonl") for name in rows)
    return texts, pairs, queries


def table(base: Any, phases: list[Phase], before: int) -> tuple[Table, dict[str, Any]]:
    """What was measured, for people and as a record."""
    codes = [m for m in base.modules() if isinstance(m, FrozenLinear)]
    quantised = sum(m.weight.nbytes + m.scale.nbytes for m in codes)
    weights = {n: p for n, p in base.named_parameters() if "lora_" not in n}
    parameters = sum(p.numel() for p in weights.values())
    rest = sum(p.nbytes for p in weights.values()) - sum(m.weight.nbytes for m in codes)
    shown = Table(title=f"{parameters / 1e9:.2f} billion parameters; MB = 10^6 bytes")
    for column in ("phase", "peak", "python and libraries", "int8 layers", "bf16 rest"):
        shown.add_column(column, justify="left" if column == "phase" else "right")
    for column in ("learning", "other adapters", "all else", "GB per billion", "seconds"):
        shown.add_column(column, justify="right")
    record: dict[str, Any] = {"parameters": parameters, "before": before, "phases": {}}
    for p in phases:
        known = before + quantised + rest + p.learns + p.adapters
        per_billion = (p.peak - before) / parameters
        parts = (p.peak, before, quantised, rest, p.learns, p.adapters, p.peak - known)
        shown.add_row(
            p.name, *(f"{n / 1e6:.0f}" for n in parts), f"{per_billion:.3f}", f"{p.seconds:.0f}"
        )
        record["phases"][p.name] = {"peak": p.peak, "gb_per_billion": per_billion}
    return shown, record


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="20b")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    options = parser.parse_args()
    quiet_libraries()
    # Freed tensors go back to the system at once; else the peaks would be those of its reserves.
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 1 << 20)
    console = Console(width=150)
    if options.shape == "20b" and device_for_training().type != "cuda":
        parser.error("the 20b shape needs a CUDA device; --shape 1b runs on a processor")
    with tempfile.TemporaryDirectory() as scratch:
        # Libraries load most of themselves at first use; that is not the model's.
        run("tiny", Path(scratch) / "rehearsal", console=console)
        gc.collect()
        shown, record = table(*run(options.shape, Path(scratch) / "run", console=console))
    console.print(shown)
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
