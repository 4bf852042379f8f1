#!/usr/bin/env bash
# Runs the `gpu` tests and every suite on this machine's GPU in under ten minutes: from a plain source tree, nothing installed, nothing
# downloaded. Needs Python with torch, triton, einops, safetensors, rich, matplotlib, timm, transformers, pytest and hypothesis.
# Results go to the folder given, else to benchmarks/results/<device>. A suite that takes too long is cut; the others still run.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export PYTHONPATH=src PYTHONUNBUFFERED=1 COLUMNS="${COLUMNS:-120}" HF_HUB_OFFLINE=1
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
results="${1:-benchmarks/results/$device}"
mkdir -p "$results"

timeout --kill-after=5 150 "$python" -m pytest -q -m gpu -p no:cacheprovider tests
tests=$?
bench() { # SUITE SECONDS OPTIONS...
    local suite=$1 seconds=$2
    shift 2
    timeout --signal=INT --kill-after=5 "$seconds" "$python" -m spatial_tokens bench --suite "$suite" --device cuda --json "$results/$suite.json" --plots "$results" "$@" ||
        echo "gpu.sh: $suite ended with $?" >&2
}
bench limits 30
bench kernels 180 --dtype bfloat16
bench llm 90 --dtype bfloat16
bench projectors 50 --dtype bfloat16
bench scaling 40 --dtype bfloat16
exit $tests
