#!/usr/bin/env bash
# Everything that needs a GPU, in one go: tests marked gpu, sparse products against cuBLAS, CUDA against CPU,
# seconds, one block against the papers' formulation (128 windows of 2048), whole runs from disk to disk. Leaves
# JSON in DIR.
#   bash benchmarks/gpu.sh DIR            on a machine with CUDA
#   bash benchmarks/gpu.sh DIR --device cpu --small    a rehearsal without one
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR [--device cpu --small]}
shift
mkdir -p "$out"
python=${PYTHON:-python3}
"$python" -m pytest -q -m gpu tests || [ $? -eq 5 ] # 5: every test was deselected
PYTHONPATH=. "$python" benchmarks/few_tokens.py --out "$out/few_tokens_cuda.json" --seconds 120 "$@"
PYTHONPATH=. "$python" benchmarks/gpu.py --out "$out/prune_cuda.json" "$@"
PYTHONPATH=. "$python" benchmarks/speed.py --out "$out/speed_block_cuda.json" \
    --shapes 8b --windows 128 --seqlen 2048 --dtype bfloat16 --device cuda "$@"
case " $* " in *" --small "*) exit 0 ;; esac # the runs below need a GPU and 4 GB of disk
big=$(mktemp -d)
trap 'rm -rf "$big"' EXIT
PYTHONPATH=. "$python" benchmarks/big.py make "$big/model" --shape 8b --blocks 4
for method in wanda sparsegpt; do
    PYTHONPATH=. "$python" benchmarks/big.py run "$big/model" --method "$method" \
        --windows 128 --seqlen 2048 --threads 16 --out "$out/big_cuda.json"
done
