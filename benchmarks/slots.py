"""Instruction slots that the loops of the kernels take for each dense weight, counted in code for GPUs.

    PYTHONPATH=.:tests python benchmarks/slots.py --out benchmarks/results/slots.json      needs no GPU
    PYTHONPATH=.:tests python benchmarks/slots.py --out benchmarks/results/slots_bitmap.json --kernels bitmap

What triton compiles for a GPU is disassembled (tests/codegen.py); the longest loop is counted. A slot is an
instruction of one lane: 32 for each instruction of a warp, over the weights that a warp goes through in a
turn. It says what a kernel costs beside reading, not how fast it is: no figure here is a time.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from codegen import Found, Job, can_compile, found
from test_kernel_bitmap_codegen import BITMAP, bitmap
from test_kernel_bitmap_codegen import weights as weights_of_any
from test_kernel_codegen import GEMV, S24, gemv, s24
from test_kernel_n8_codegen import N8, WEIGHTS, n8
from test_kernel_s24_bits_codegen import BITS, s24_bits, weights
from timing import circumstances, write

from llmprune.kernels.gemv_layout import Chunk
from llmprune.kernels.s24_layout import COLUMNS, ROWS, TILES

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 89, 90, 100)
KERNELS = ("s24_mma", "s24_bits int8", "s24_bits int4", "n8_mma", "nm_gemv", "bitmap")


def main() -> None:
    """Compile, count, write the JSON file, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    parser.add_argument("--kernels", nargs="+", default=KERNELS[:-1], choices=KERNELS)
    args = parser.parse_args()
    if not can_compile():
        raise SystemExit("the ptxas and cuobjdump that triton ships do not run here")
    result = circumstances(torch.device("cpu"), False)
    cases = [
        case for arch in args.arch for case in _cases(arch) if case[1]["kernel"] in args.kernels
    ]
    counted = found([job for job, _, _ in cases], ROOT)
    rows = [_row(*case, one) for case, one in zip(cases, counted, strict=True)]
    write(args.out, {**result, "rows": rows})
    for row in rows:
        print(
            f"sm_{row['arch']:<4} {row['kernel']:<13} {row['pattern']:<5} {row['tokens']:>3} tokens  "
            f"{row['slots_per_weight']:.2f} slots per weight  {row['registers']} registers"
        )


def _cases(arch: int) -> Iterator[tuple[Job, dict[str, Any], int]]:
    """Jobs, what they are, and the weights that a warp goes through in a turn."""
    for tokens in S24:
        yield s24(arch, tokens), _told("s24_mma", "2:4", tokens), TILES * ROWS * COLUMNS
    for bits, tokens in BITS:
        job = s24_bits(arch, bits, tokens)
        yield job, _told(f"s24_bits int{bits}", "2:4", tokens), weights(job)
    for tokens, n in N8:
        yield n8(arch, tokens, n), _told("n8_mma", f"{n}:8", tokens), WEIGHTS
    for tokens, n, m in GEMV:
        told = _told("nm_gemv", f"{n}:{m}", tokens)
        yield gemv(arch, tokens, n, m), told, 32 * Chunk(n, m).columns
    for tokens, n in BITMAP:
        job = bitmap(arch, tokens, n)
        yield job, _told("bitmap", f"{n}:32" if n else "any", tokens), weights_of_any(job)


def _told(kernel: str, pattern: str, tokens: int) -> dict[str, Any]:
    return {"kernel": kernel, "pattern": pattern, "tokens": tokens}


def _row(job: Job, told: dict[str, Any], weights: int, one: Found) -> dict[str, Any]:
    return {
        "arch": job.arch,
        **told,
        "slots_per_weight": round(one.per_weight(weights), 3),
        "registers": one.registers,
        "spilled_bytes": one.stack,
        "shared_bytes": one.shared,
        "loop": one.loop,
    }


if __name__ == "__main__":
    main()
