"""What the kernels become on GPUs that are not here: the gate before one is."""

from __future__ import annotations

from pathlib import Path

import pytest
from codegen import ARCHITECTURES, Found, Job, can_compile, found, longest_loop

from llmprune.kernels.nm_gemv import Chunk

pytest.importorskip("triton", reason="triton is not installed on this platform")

WARPS = 8
# Instruction slots per dense weight that an H200 has while it reads 9 bits per weight at 90% of its
# bandwidth, from its clocks and units; an H100 and an A100 have 11, cards with GDDR memory 24 and more.
BUDGET_H200 = 7.7
# What the loop may take, by tokens, n and m: what triton 3.7.1 made of it for sm_90, and a tenth.
GEMV = {
    (1, 2, 4): 5.0,
    (4, 2, 4): 6.1,
    (8, 2, 4): 8.9,  # more than an H200 has: there, more than 4 tokens are for s24_mma
    (1, 4, 8): 5.0,
    (1, 8, 16): 5.0,
    (1, 5, 16): 3.0,
}
EXCHANGES = {"LDS", "STS", "SHFL", "BAR", "LDL", "STL"}


@pytest.fixture(autouse=True)
def _tools() -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")


def gemv(arch: int, tokens: int, n: int, m: int, even: bool = True, bfloat: bool = True) -> Job:
    chunk = Chunk(n, m)
    half = "*bf16" if bfloat else "*fp16"
    types = {"words": "*i32", "x": half if tokens == 1 else "*fp32", "bias": half, "y": half}
    constants = {"N": n, "M": m, "BITS": chunk.bits, "VALUES": chunk.values}
    constants |= {"TOKENS": min(tokens, 4), "TILES": 2 if tokens > 4 else 1, "WARPS": WARPS}
    constants |= {"SPLIT": 1, "EVEN": even, "BFLOAT": bfloat, "BIAS": True}
    types |= dict.fromkeys(("rows", "columns", "chunks", "tokens"), "i32")
    unaligned = ["tokens"] if even else ["rows", "columns", "chunks", "tokens"]
    return Job("nm_gemv_triton", "gemv_kernel", types, constants, WARPS, arch, False, unaligned)


def no_detours(one: Found) -> None:
    """Outside the loop ptxas may put a word or two aside, as it does for sm_100."""
    assert one.stack <= 16, "registers are spilled"
    assert not EXCHANGES & one.loop.keys(), f"values change lanes or are spilled: {one.loop}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nm_gemv_compiles_without_detours(arch: int, tmp_path: Path, root: Path) -> None:
    jobs = [gemv(arch, 1, 2, 4), gemv(arch, 8, 8, 16, even=False, bfloat=False)]
    for job, one in zip(jobs, found(jobs, tmp_path, root), strict=True):
        no_detours(one)
        assert one.registers <= 128, job


def test_nm_gemv_stays_within_its_instructions(tmp_path: Path, root: Path) -> None:
    jobs = [gemv(90, *which) for which in GEMV]
    for (which, most), one in zip(GEMV.items(), found(jobs, tmp_path, root), strict=True):
        no_detours(one)
        assert one.stack == 0
        took = one.per_weight(32 * Chunk(*which[1:]).columns)
        assert took <= most, f"{which}: {took:.2f} slots per weight, {one.loop}"
        assert took <= BUDGET_H200 or which[0] > 4


def test_the_longest_loop_is_found() -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0020*/              @!P0 LDG.E R5, [R2.64] ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/               @P1 BRA `(.L_x_1) 0x10 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
"""
    assert longest_loop(sass) == ["IMAD.WIDE", "LDG.E", "BRA", "BRA"]
