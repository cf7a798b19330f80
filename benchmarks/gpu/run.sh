#!/usr/bin/env bash
# Correctness, then speed, on this machine's GPU; ends within nine minutes and needs no network.
#
#   benchmarks/gpu/run.sh          measure; the page goes to $OUT if that is set
#   benchmarks/gpu/run.sh --dry    the same code on the processor, on models of nothing
#
# The package is used from this checkout. What else it imports must be there: torch, transformers,
# accelerate, peft, pydantic, jaxtyping, scipy; what is missing is named, and can be put on
# PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
exec timeout --signal=INT 535 "${PYTHON:-python3}" -m benchmarks.gpu "$@"
