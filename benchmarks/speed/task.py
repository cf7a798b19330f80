"""What is to be measured, said once for every system; standard library only, as peers import it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

TEMPLATE = "{query} {response}"
EOS, PAD = "<eos>", "<pad>"
LORA_RANK, LORA_ALPHA = 16, 32
BLOCK = 256
"""Tokens of a packed supervised sequence."""
SHAPES = {
    "S": (4, 256, 4, 8192),
    "M": (12, 768, 12, 16384),
    "tiny": (1, 32, 2, 256),
}
"""Layers, width, heads, vocabulary."""
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "34359738368",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
}
"""What `suasion.core.memory` sets: glibc keeps what it was given instead of returning it to the
system after every tensor, and few kernels are kept."""


@dataclass(frozen=True, order=True)
class Task:
    """One process of one system."""

    system: str
    """Module of this package that does it: ours, generate, trl_classic, trl_last, trl_new."""
    work: str = "ppo"
    """ppo, rollout, sft or reward."""
    shape: str = "S"
    """Key of SHAPES."""
    family: str = "gpt2"
    """gpt2 or llama."""
    precision: str = "default"
    """default (as installed), fp32 or bf16."""
    matmul: str = "default"
    """fast: a peer is given the faster way to multiply fp32 matrices; ours chooses by itself."""
    critic: str = "trunk"
    """trunk or separate."""
    epochs: int = 4
    """Of the PPO update."""
    lora: bool = False
    """Adapters of rank LORA_RANK on every linear layer instead of all weights."""
    lean: bool = False
    """Ours alone: with the options that save memory."""
    keep_pages: bool = False
    """Run with KEEP_PAGES in the environment."""
    batch: int = 16
    """Responses, sequences or pairs per iteration."""
    response: int = 64
    """Longest response, tokens."""
    vocabulary: int = 0
    """0: the shape's own."""
    ending: bool = True
    """Whether responses end by themselves (about one token in fifty) or all at their limit."""
    iterations: int = 4
    """The first one is not counted."""

    def text(self) -> str:
        """For the command line of the process."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Task:
        """Read `text()` back; unknown keys are errors."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """What tells it from the others: everything that is not the default."""
        plain = replace(Task(self.system), iterations=self.iterations)
        told = [
            f"{entry.name}={getattr(self, entry.name)}"
            for entry in fields(self)
            if getattr(self, entry.name) != getattr(plain, entry.name)
        ]
        return " ".join([self.system, *told])

    @property
    def vocabulary_size(self) -> int:
        """Words, the two special ones included."""
        return self.vocabulary or SHAPES[self.shape][3]

    def folder(self, root: Path) -> Path:
        """Where its models and texts are, below `root`."""
        ending = "" if self.ending else "-endless"
        return root / f"{self.family}-{self.shape}-{self.vocabulary_size}{ending}"

    def on(self, **changes: object) -> Task:
        """The same with other settings."""
        return replace(self, **changes)  # type: ignore[arg-type]
