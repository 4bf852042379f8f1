#!/usr/bin/env bash
# Regenerates benchmarks/results/cpu: about 110 minutes on two cores, with 24 GiB of memory. Let nothing else run beside it.
# What export.py, serving.py, scale_out.py and place_probe.py beside it write there is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
results=benchmarks/results/cpu
mkdir -p "$results"
export PYTHONPATH=src
for suite in ${*:-limits kernels factorized projectors llm scaling}; do
    "$python" -m spatial_tokens bench --suite "$suite" --device cpu --json "$results/$suite.json" --plots "$results"
    if [ "$suite" = projectors ]; then # a second run, as an order is believed if two agree
        OMP_NUM_THREADS=1 "$python" -m spatial_tokens bench --suite "$suite" --device cpu --json "$results/projectors_one_thread.json"
    fi
done
"$python" benchmarks/figures.py
