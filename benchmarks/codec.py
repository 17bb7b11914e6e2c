"""Packing and expanding a matrix, beside plain copies of it, in one process.

    python benchmarks/codec.py --out benchmarks/results/codec-cpu.json

For each dtype, pattern and number of threads: the jobs below alternate `--repeats` times after one round
that does not count. GB/s are bytes of the *dense* matrix over seconds, median and quartiles, and their share
of the rate of `copy`. Nothing is printed unless values and bitmap are those that numpy finds, and the
expanded matrix is the dense one, bit for bit.

| job | what |
|---|---|
| copy | `to.copy_(dense)` into memory that was written before |
| clone | `dense.clone()`: a copy into fresh memory |
| pack | `pack(dense)`, into fresh memory |
| pack by mask | `pack(dense, keep)`, likewise; it also makes sure that nothing outside the mask is lost |
| unpack | `unpack(packed, out)` into memory that was written before |
| unpack fresh | `unpack(packed)` |
| plain pack, plain unpack | the same in plain torch (`packed_torch`), for the first case alone |
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import _commit
from torch import Tensor

from llmprune.kernels import packed_torch
from llmprune.kernels.packed import Packed, pack, unpack
from llmprune.kernels.packed_numba import WIDE
from llmprune.pattern import parse
from llmprune.provenance import versions

WORDS = {2: torch.int16, 4: torch.int32}


def main() -> None:
    args = _arguments()
    cases = []
    for dtype, pattern in product(args.dtypes, args.patterns):
        dense, keep = _matrix(args.shape, getattr(torch, dtype), pattern)
        packed = _checked(dense, keep)
        for threads in args.threads:
            torch.set_num_threads(threads)
            jobs = _jobs(dense, keep, packed, plain=not cases)
            case = {"dtype": dtype, "pattern": pattern, "threads": threads}
            case |= {"bytes": dense.nbytes, "packed_share": packed.bytes / dense.nbytes}
            cases.append({**case, "rows": _measure(jobs, dense.nbytes, args.repeats)})
            print(_table(cases[-1]), flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        "versions": {**versions(torch.device("cpu")), "numba": version("numba")},
        "wide_instructions": WIDE,
        "shape": args.shape,
        "repeats": args.repeats,
        "load_average": os.getloadavg(),
        "cases": cases,
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--small", action="store_true", help="a rehearsal with a small matrix")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.small:
        args.shape, args.repeats = [64, 1028], 2
    return args


def _matrix(shape: list[int], dtype: torch.dtype, pattern: str) -> tuple[Tensor, Tensor]:
    """Random normal weights without the least by magnitude, and what stays."""
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    keep = parse(pattern).keep(dense.abs())
    return dense.to(dtype).masked_fill_(~keep, 0), keep


def _checked(dense: Tensor, keep: Tensor) -> Packed:
    """The packed matrix, once numpy has found the same."""
    packed = pack(dense, keep)
    words, mask = dense.view(WORDS[dense.element_size()]).numpy(), keep.numpy()
    values = packed.values.view(WORDS[dense.element_size()]).numpy()
    same = [
        np.array_equal(packed.bitmap.numpy(), np.packbits(mask, axis=-1, bitorder="little")),
        np.array_equal(values, words[mask]),
        np.array_equal(unpack(packed).view(WORDS[dense.element_size()]).numpy(), words),
    ]
    if not all(same):
        raise SystemExit(f"bitmap, values or expanded matrix differ: {same}")
    return packed


def _jobs(
    dense: Tensor, keep: Tensor, packed: Packed, plain: bool
) -> dict[str, Callable[[], object]]:
    out, kind = torch.zeros_like(dense), WORDS[dense.element_size()]
    words, values, to = dense.view(kind), packed.values.view(kind), out.view(kind)
    jobs: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(dense),
        "clone": dense.clone,
        "pack": lambda: pack(dense),
        "pack by mask": lambda: pack(dense, keep),
        "unpack": lambda: unpack(packed, out),
        "unpack fresh": lambda: unpack(packed),
    }
    if plain:
        columns = dense.shape[1]
        jobs["plain pack"] = lambda: packed_torch.pack(words, None)
        jobs["plain unpack"] = lambda: packed_torch.expand(packed.bitmap, columns, values, 0, to)
    return jobs


def _measure(
    jobs: dict[str, Callable[[], object]], size: int, repeats: int
) -> list[dict[str, Any]]:
    """GB/s of each job, and its share of the copy's."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            begun = time.perf_counter()
            job()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    rows = []
    copied = statistics.median(seconds["copy"])
    for name, took in seconds.items():
        quarters = statistics.quantiles(took, n=4, method="inclusive")
        slow, middle, fast = (size / 1e9 / q for q in reversed(quarters))
        rates = {"gb_s": middle, "quartiles": [slow, fast]}
        rows.append({"job": name, **rates, "of_copy": copied / statistics.median(took)})
    return rows


def _table(case: dict[str, Any]) -> str:
    lines = [f"{case['dtype']} {case['pattern']}, {case['threads']} threads"]
    for row in case["rows"]:
        low, high = row["quartiles"]
        lines.append(
            f"  {row['job']:<14}{row['gb_s']:7.2f} GB/s ({low:.2f} to {high:.2f}), "
            f"{row['of_copy']:.2f} of copy"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
