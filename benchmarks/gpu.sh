#!/usr/bin/env bash
# The kernels for packed matrices on a GPU, within nine minutes: whether they are right, how long products take,
# how long a whole model takes. Leaves JSON in DIR, prints short tables.
#   bash benchmarks/gpu.sh DIR                         on a machine with CUDA
#   bash benchmarks/gpu.sh DIR --device cpu --small    a rehearsal without one
#   bash benchmarks/gpu.sh DIR --pruning [...]         instead: pruning on CUDA. Tests marked gpu (with pytest),
#       CUDA against CPU, one block against the papers' formulation, the solvers' kernels and a whole model by
#       them, whole runs from disk to disk (4 GB of disk)
# Needs no installation: PYTHON chooses the interpreter, COMMIT says which commit it is where git does not.
# LLMPRUNE_TOKENS=16 says that layers may be slower than dense for more than 16 tokens (docs/kernels.md).
# The status is 1 if something was wrong or broke off; what was measured until then is in DIR all the same.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh DIR [--pruning] [--device cpu --small]}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export LLMPRUNE_CACHE=$scratch/cache # what is measured here depends on nothing that was measured before
failed=() late=()
whole=530 caps=1 # seconds for everything; a rehearsal takes what it takes
case " $* " in *" --small "*) whole=53000 caps=100 ;; esac

# part NAME SECONDS COMMAND...: run it that long at most; remember what went wrong, go on.
part() {
    local name=$1 most=$(($2 * caps)) left=$((whole - SECONDS)) status
    shift 2
    if [ "$left" -lt 20 ]; then
        late+=("$name: not begun")
        return
    fi
    [ "$most" -le "$left" ] || most=$left
    echo "== $name (at most $most s)"
    timeout -k 5 "$most" "$python" "$@"
    status=$?
    case $status in
    0) ;;
    124 | 137) late+=("$name: ended after $most s") ;;
    *) failed+=("$name: status $status") ;;
    esac
    return $status
}

ended() {
    echo "== $SECONDS s; JSON in $out"
    [ ${#late[@]} = 0 ] || printf 'for want of time: %s\n' "${late[@]}"
    [ ${#failed[@]} = 0 ] || printf 'FAILED: %s\n' "${failed[@]}"
    [ ${#failed[@]} = 0 ]
}

if [ "${1:-}" = --pruning ]; then
    shift
    whole=1000000
    if "$python" -c 'import pytest' 2>/dev/null; then
        "$python" -m pytest -q -o addopts= -m gpu tests # no plugins needed
        case $? in 0 | 5) ;; *) failed+=("pytest -m gpu") ;; esac # 5: every test was deselected
    else
        late+=("pytest -m gpu: pytest is not installed")
    fi
    part "CUDA against CPU" 3600 benchmarks/gpu.py --out "$out/prune_cuda.json" "$@"
    part "one block" 3600 benchmarks/speed.py --out "$out/speed_block_cuda.json" \
        --shapes 8b --windows 128 --seqlen 2048 --dtype bfloat16 --device cuda "$@"
    part "solver kernels" 600 benchmarks/solver_kernels.py --out "$out/solver_kernels.json" "$@"
    case " $* " in *" --small "*) ended && exit 0 || exit 1 ;; esac # the runs below need a GPU
    part "a model" 3600 benchmarks/big.py make "$scratch/model" --shape 8b --blocks 4
    for method in wanda sparsegpt; do
        part "$method from disk to disk" 3600 benchmarks/big.py run "$scratch/model" --method "$method" \
            --windows 128 --seqlen 2048 --threads 16 --out "$out/big_cuda.json"
    done
    ended && exit 0 || exit 1
fi

model=()
case " $* " in *" --small "*) model=(--layers 2 --rounds 2) ;; esac
if ! part "right" 110 benchmarks/correct.py --out "$out/correct.json" "$@"; then
    [ ${#failed[@]} != 0 ] || failed+=("right: not known in time")
fi
part "few tokens" 215 benchmarks/few_tokens.py --out "$out/few_tokens.json" \
    --correct "$out/correct.json" --seconds 165 "$@"
part "experts" 75 benchmarks/experts.py --out "$out/experts.json" --seconds 45 "$@"
part "end to end" 160 benchmarks/end_to_end.py --out "$out/end_to_end.json" --tried "$out/few_tokens.json" \
    --seconds $((whole - SECONDS < 160 ? whole - SECONDS - 35 : 125)) "${model[@]}" "$@"
part "few tokens at 3:8" 60 benchmarks/few_tokens.py --out "$out/few_tokens_3_8.json" --pattern 3:8 \
    --correct "$out/correct.json" --seconds 30 "$@"
set -- "$LLMPRUNE_CACHE"/kernels/*.json # what layers measured when they were first laid out
if [ -f "$1" ]; then
    part "what layers measured" 30 benchmarks/sweep.py --merge "$@" --out "$out/measured_by_layers.json"
fi
ended && exit 0 || exit 1
