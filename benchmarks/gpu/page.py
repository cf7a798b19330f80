"""docs/benchmarks-gpu.md from what was measured."""

from __future__ import annotations

import textwrap
from typing import Any

GIGA, TERA = 1e9, 1e12
ABOUT = """Random Llama weights. Ours: fp32 master weights, bf16 arithmetic. Plain: the library's
`generate` on bf16 weights, then padded batches under bf16 autocast, every logit computed. Both had
the same prompts and length limits in the same call. Utilisation: operations of the model on real
tokens, over time and over the measured rate of a large bf16 product; of the PPO iteration, of
everything after the rollout."""


def markdown(record: dict[str, Any]) -> str:
    """The page; its table is last."""
    ceilings = record["ceilings"]
    made = ", ".join(f"{key} {value}" for key, value in record["made"].items())
    measured = ", ".join(
        f"{name.removesuffix(' flops')} product {value / TERA:.3g} TFLOP/s"
        for name, value in ceilings.items()
        if name.endswith("flops")
    )
    lines = [
        "# Speed on a GPU",
        "",
        textwrap.fill(ABOUT, 100),
        "",
        f"Written by `benchmarks/gpu/run.sh`: {made}.",
        "",
        f"Measured first: {measured}, copy {ceilings['copy bytes'] / GIGA:.3g} GB/s.",
        "",
        *(f"- {line}" for line in record["checks"]),
        "",
        "| model | work | suasion | plain | ratio | utilisation | plain's | peak | plain's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    found = {(row["shape"], row["work"], row["side"]): row for row in record["rows"]}
    for shape, work in dict.fromkeys((shape, work) for shape, work, _ in found):
        ours, plain = (found.get((shape, work, side)) for side in ("suasion", "plain"))
        pair = (ours, plain)
        ratio = ours["tokens_per_second"] / plain["tokens_per_second"] if ours and plain else None
        cells = [
            shape,
            work,
            *(f"{row['tokens_per_second']:.0f} tokens/s" if row else "" for row in pair),
            "" if ratio is None else f"**{ratio:.2f}**",
            *(f"{row['utilisation']:.1%}" if row and "utilisation" in row else "" for row in pair),
            *(f"{row['peak_bytes'] / GIGA:.1f} GB" if row else "" for row in pair),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
