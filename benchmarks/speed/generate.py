"""The library's own `generate`, fp32, as what a rollout is compared with.

python -m benchmarks.speed.generate TASK FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.models import table
from benchmarks.speed.probe import Probe
from benchmarks.speed.task import Task


def main(text: str, root: str) -> None:
    """Do one task."""
    task = Task.parse(text)
    folder = task.folder(Path(root))
    kind = torch.bfloat16 if task.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    queries = [row["query"] for row in table(folder / "prompts.jsonl")]
    probe = Probe()
    probe.watch(model.get_input_embeddings())
    torch.manual_seed(1)
    for step in range(task.iterations):
        part = queries[step * task.batch : (step + 1) * task.batch]
        probe.start()
        inputs = tokenizer(part, return_tensors="pt", padding=True)
        found = model.generate(
            **inputs, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=task.response
        )
        probe.mark("rollout")
        answers = found[:, inputs["input_ids"].shape[1] :]
        lengths = (answers != tokenizer.pad_token_id).sum(-1)
        probe.stop(inputs["attention_mask"].sum(-1).tolist(), lengths.tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
