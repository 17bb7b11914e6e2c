"""The table that ships for a GPU: warps and split of every kernel, over the shapes of common models.

    python benchmarks/sweep.py --out kernels/measured/h200.json [--seconds 540]     on a machine with CUDA
    python benchmarks/sweep.py --out kernels/measured/h200.json --patterns 4:8 3:8 2:8    what n8_mma holds
    python benchmarks/sweep.py --out kernels/measured/h200.json --few int8 int4     2:4 in few bits as well
    python benchmarks/sweep.py --merge A.json B.json --out C.json          several runs as one table

Measures as llmprune.kernels.tune does (kernels/tuning.py), shape by shape, without a model; what is measured
already in --out is left out, so that a second run goes on where the first ended. Beforehand, processes
compile all launches at once into triton's cache, which would otherwise take most of the time. Prints the
table, losses among it; who reads it decides what ships. benchmarks/notes.md has the steps.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from experts import MIXTURES
from few_tokens import SHAPES

from llmprune.kernels import experts, experts_measure, gpu, measure, table, tuning
from llmprune.kernels.choice import offered
from llmprune.kernels.experts_table import matrix_of
from llmprune.kernels.interface import Case, Mixture
from llmprune.kernels.measure import Bench, Way
from llmprune.kernels.words import Measured

APART = {  # the same models with q, k, v, gate and up as layers of their own, as transformers has them
    "Llama-3-8B k": (1024, 4096),
    "Llama-3-8B gate": (14336, 4096),
    "Llama-3-70B k": (1024, 8192),
    "Llama-3-70B gate": (28672, 8192),
    "Qwen3-4B q": (4096, 2560),
    "Qwen3-4B k": (1024, 2560),
    "Qwen3-4B o": (2560, 4096),
    "Qwen3-4B gate": (9728, 2560),
}
GROUPS = {"int8": 0, "int4": 128}  # columns that share a scale, as `--quantize` has it; 0 is all
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Compile, measure, write and print the table."""
    args = _arguments()
    if args.merge:
        table.write(_merged(args.merge), args.out)
        return
    device, begun = torch.device(args.device), time.monotonic()
    dtypes = [DTYPES[name] for name in args.dtypes]
    cases = list(_cases(device, args.patterns, dtypes, args.small, args.few))
    if args.compile is not None:
        _compile(cases[args.compile :: args.processes], args.tokens)
        return
    known = table.read(args.out) if args.out.is_file() else table.Table()
    left = [case for case in cases if not _known(known, case, set(args.tokens))]
    if args.processes > 1 and left:
        _compile_apart(args, 0.3 * args.seconds)
    notes = list[str]()
    for case in left:
        seconds = args.seconds - (time.monotonic() - begun)
        found = tuning.measured([case], args.tokens, seconds, measure.slow_timer, time.monotonic)
        for matrix, timings in found.timings.items():
            known.add(matrix, timings.values())
        notes += found.notes
        table.write(known, args.out)
    print(known, *notes, sep="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--merge", type=Path, nargs="+", help="tables; of one matrix the last counts"
    )
    parser.add_argument("--seconds", type=float, default=540, help="for all of it")
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument(
        "--few", nargs="*", default=[], choices=list(GROUPS), help="2:4 in these, too"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(tuning.TOKENS))
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a rehearsal with one tiny shape")
    parser.add_argument("--compile", type=int, help="in a process that compiles: which one it is")
    return parser.parse_args()


def _cases(
    device: torch.device,
    patterns: list[str],
    dtypes: list[torch.dtype],
    small: bool,
    few: Sequence[str] = (),
) -> Iterator[Case]:
    """A layer of each shape, pattern and dtype, and of 2:4 each of few bits.

    `50%` is any mask that keeps half.
    """
    shapes = {"small": (64, 256)} if small else {**SHAPES, **APART}
    for pattern, dtype in product(patterns, dtypes):
        n, _, m = pattern.partition(":")
        share = int(n) / int(m) if m else int(n.removesuffix("%")) / 100
        held = pattern if m else "unstructured"
        for rows, columns in shapes.values():
            kept = round(rows * columns * share)
            case = Case((rows, columns), kept, dtype, device, held, "rows", False, 1, False)
            yield case
            for kind in few if pattern == "2:4" else ():
                group = GROUPS[kind] or columns
                yield replace(case, bits=int(kind[3:]), group=group, rounded=dtype)
        for mixture in MIXTURES.values() if pattern == "2:4" and not small else ():
            number, hidden, inside = mixture.experts, mixture.hidden, mixture.intermediate
            for shape in ((2 * inside, hidden), (hidden, inside)):
                kept = number * shape[0] * shape[1] // 2
                plain = Case(shape, kept, dtype, device, pattern, "rows", False, 1, False)
                yield Mixture(**vars(plain), experts=number, each=mixture.chosen)


def _kernels(case: Case) -> list[Measured[Any]]:
    """Those that can multiply by a matrix for n:m."""
    return [k for k in offered(case) if isinstance(k, Measured) and k.unfit(case) is None]


def _known(found: table.Table, case: Case, tokens: set[int]) -> bool:
    """Whether every kernel that can do it is in the table already, for all `tokens`."""
    device = gpu.whole(case.device)
    if isinstance(case, Mixture):
        fit = experts.S24_EXPERTS.unfit(case) is None
        return fit and tokens <= found.timings.get(matrix_of(case), {}).keys()
    matrices = [kernel.matrix(device, case.sides, case.dtype) for kernel in _kernels(case)]
    return bool(matrices) and all(tokens <= found.timings.get(m, {}).keys() for m in matrices)


def _compile_apart(args: argparse.Namespace, seconds: float) -> None:
    """Have other processes run every launch once, each for a part of the shapes; what they left is left."""
    command = [sys.executable, *sys.argv, "--compile"]
    children = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.DEVNULL)
        for i in range(args.processes)
    ]
    end = time.monotonic() + seconds
    for child in children:
        try:
            child.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _compile(cases: list[Case], tokens: list[int]) -> None:
    """Every launch of every kernel for `cases`, once."""
    for case in cases:
        if isinstance(case, Mixture):
            if experts.S24_EXPERTS.unfit(case) is None:
                mixture = experts_measure.Bench(case)
                for count in tokens:
                    mixture.time(count, mixture.launches(), _untimed)
            continue
        for kernel in _kernels(case):
            bench = Bench(kernel, gpu.whole(case.device), case.sides, case.dtype)
            for count in tokens:
                bench.time(count, bench.launches(), _untimed)


def _untimed(device: torch.device, ways: Sequence[Way]) -> list[float]:
    """Takes no time."""
    return [1.0 for _ in ways]


def _merged(paths: list[Path]) -> table.Table:
    """All tables as one; of a matrix that several have, the last counts."""
    whole = table.Table()
    for path in paths:
        for matrix, timings in table.read(path).timings.items():
            whole.add(matrix, timings.values())
    return whole


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as own:
        os.environ["LLMPRUNE_CACHE"] = own  # what is measured here goes to --out alone
        main()
