#!/usr/bin/env bash
# Regenerates benchmarks/results/cpu: about 100 minutes on two cores, with 24 GiB of memory. Let nothing else run beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
results=benchmarks/results/cpu
mkdir -p "$results"
for suite in ${*:-limits kernels factorized projectors llm scaling}; do
    PYTHONPATH=src "$python" -m spatial_tokens bench --suite "$suite" --device cpu --json "$results/$suite.json" --plots "$results"
done
PYTHONPATH=src "$python" benchmarks/figures.py
