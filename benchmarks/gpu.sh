#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests marked gpu, CUDA against CPU, seconds, one block against the
# papers' formulation (128 windows of 2048). Leaves JSON in DIR.
#   bash benchmarks/gpu.sh DIR            on a machine with CUDA
#   bash benchmarks/gpu.sh DIR --device cpu --small    a rehearsal without one
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR [--device cpu --small]}
shift
mkdir -p "$out"
python=${PYTHON:-python3}
"$python" -m pytest -q -m gpu tests || [ $? -eq 5 ] # 5: every test was deselected
PYTHONPATH=. "$python" benchmarks/gpu.py --out "$out/prune_cuda.json" "$@"
PYTHONPATH=. "$python" benchmarks/speed.py --out "$out/speed_block_cuda.json" \
    --shapes 8b --windows 128 --seqlen 2048 --dtype bfloat16 --device cuda "$@"
