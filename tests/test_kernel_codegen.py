"""What the kernels become on GPUs that are not here: the gate before one is."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from pathlib import Path

import pytest
from codegen import ARCHITECTURES, Found, Job, can_compile, found, longest_loop

from llmprune.kernels.gemv_layout import Chunk
from llmprune.kernels.s24_layout import COLUMNS, ROWS, TILES

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
    (1, 8, 16): 5.0,
    (1, 5, 16): 3.0,
}
# The same for s24_mma, by tokens.
S24 = {8: 0.54, 16: 0.91, 32: 1.7, 64: 3.3}
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


def s24(
    arch: int,
    tokens: int,
    half: str = "bf16",
    every: bool = True,
    gated: bool = False,
    parts: bool = False,
) -> Job:
    eights = 1 << (-(-tokens // 8) - 1).bit_length()
    value = {"bf16": "*bf16", "f16": "*fp16"}[half]
    types = {"words": "*i32", "x": "*i32", "bias": value, "y": "*fp32" if parts else value}
    types |= dict.fromkeys(("chunks", "share", "tokens", "out"), "i32")
    constants: dict[str, int | bool | str] = {"WARPS": WARPS, "TILES": TILES, "EIGHTS": eights}
    constants |= {"HALF": half, "ALL": every, "BIAS": not parts, "GATED": gated, "PARTS": parts}
    constants["ACROSS"] = 1 if gated else min(eights, 4)
    unaligned = ["chunks", "share", "tokens", "out"]
    return Job("s24_gluon", "s24_kernel", types, constants, WARPS, arch, True, unaligned)


def with_ones(job: Job, *names: str) -> Job:
    """The arguments `names` are 1: Triton then makes constants of them, which have fewer methods."""
    types = {name: of for name, of in job.types.items() if name not in names}
    return replace(job, types=types, constants=job.constants | dict.fromkeys(names, 1))


def warped(job: Job, warps: int) -> Job:
    """With another number of warps, as measuring tries it."""
    return replace(job, warps=warps, constants=job.constants | {"WARPS": warps})


def no_detours(one: Found, apart: Set[str] = frozenset()) -> None:
    """Outside the loop ptxas may put a word or two aside, as it does for sm_100."""
    assert one.stack <= 16, "registers are spilled"
    detours = EXCHANGES - apart & one.loop.keys()
    assert not detours, f"values change lanes or are spilled: {one.loop}"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nm_gemv_compiles_without_detours(arch: int, root: Path) -> None:
    jobs = [
        with_ones(gemv(arch, 1, 2, 4), "tokens"),
        gemv(arch, 8, 2, 4, even=False, bfloat=False),
    ]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        no_detours(one)
        assert one.registers <= 128, job


@pytest.mark.slow
def test_nm_gemv_stays_within_its_instructions(root: Path) -> None:
    jobs = [gemv(90, *which) for which in GEMV]
    for (which, most), one in zip(GEMV.items(), found(jobs, root), strict=True):
        no_detours(one)
        assert one.stack == 0
        took = one.per_weight(32 * Chunk(*which[1:]).columns)
        assert took <= most, f"{which}: {took:.2f} slots per weight, {one.loop}"
        assert took <= BUDGET_H200 or which[0] > 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_s24_mma_compiles_to_sparse_tensor_cores(arch: int, root: Path) -> None:
    jobs = [
        with_ones(s24(arch, 1), "tokens"),
        s24(arch, 16, "f16", every=False, gated=True),
    ]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        no_detours(one, {"SHFL"})  # neighbours trade halves of the inputs
        half = ".BF16" if job.constants["HALF"] == "bf16" else ""
        assert one.names == [f"HMMA.SP.16832.F32{half}"]
        eights = job.constants["EIGHTS"]
        assert one.loop["HMMA"] == 8 * TILES * eights  # steps of a chunk, each once
        assert one.loop["SHFL"] == 8 * 2 * eights


def test_s24_mma_stays_within_its_instructions(root: Path) -> None:
    jobs = [s24(90, tokens) for tokens in S24]
    for (tokens, most), one in zip(S24.items(), found(jobs, root), strict=True):
        no_detours(one, {"SHFL"})
        assert one.stack == 0
        took = one.per_weight(TILES * ROWS * COLUMNS)
        assert took <= most < BUDGET_H200, f"{tokens}: {took:.2f} slots per weight, {one.loop}"


@pytest.mark.slow
def test_every_variant_compiles(root: Path) -> None:
    """What the launchers may ask for beside what the tests above look into, for one GPU."""
    every = [(16, g, p) for g in (False, True) for p in (False, True)]
    jobs = [s24(90, tokens, "f16", False, gated, parts) for tokens, gated, parts in every]
    jobs += [
        with_ones(s24(90, 1, every=False, gated=True), "tokens", "chunks", "share", "out"),
        with_ones(s24(90, 1, parts=True), "tokens", "chunks", "share", "out"),
        with_ones(gemv(90, 1, 2, 4, even=False), "tokens", "chunks", "rows"),
        gemv(90, 2, 3, 4, even=False),
        *(add(gated) for gated in (False, True)),
        with_ones(add(False), "out", "step"),
        *(warped(job, warps) for job in (s24(90, 16), gemv(90, 8, 2, 4)) for warps in (4, 16)),
    ]
    assert all(one.stack <= 16 for one in found(jobs, root))


def add(gated: bool) -> Job:
    types = {"parts": "*fp32", "bias": "*bf16", "y": "*bf16", "out": "i32", "step": "i32"}
    constants = {"SPLIT": 4, "BIAS": True, "GATED": gated, "BLOCK": 256}
    return Job("split_triton", "add_kernel", types, constants, 4, 90, False, ["out", "step"])


def expanding(arch: int, unaligned: bool = True) -> list[Job]:
    """The kernels that expand: as layers of ordinary sizes ask for them, or of odd ones."""

    def job(name: str, types: dict[str, str], constants: dict[str, int], *sizes: str) -> Job:
        types = types | dict.fromkeys(sizes, "i32")
        odd = list(sizes) if unaligned else []
        return Job("expand_triton", name, types, constants, 4, arch, False, odd)

    bitmap = {"bitmap": "*u8", "values": "*i16", "counts": "*i32", "ends": "*i64", "out": "*i16"}
    jobs = [
        job("count_kernel", {"bitmap": "*u8", "counts": "*i32"}, {"BYTES": 128}, "width"),
        job("bitmap_kernel", bitmap, {"BYTES": 128}, "columns", "width", "kept"),
        job("s24_kernel", {"words": "*i32", "out": "*i64"}, {}, "rows", "quads", "chunks"),
    ]
    for n, m in ((2, 4), (4, 8), (5, 16), (1, 2)):
        chunk, out = Chunk(n, m), "*i32" if m == 2 else "*i64"
        constants = {"N": n, "M": m, "BITS": chunk.bits, "VALUES": chunk.values, "UNITS": 32}
        types = {"words": "*i32", "out": out}
        jobs.append(job("gemv_kernel", types, constants, "rows", "units", "chunks"))
    return jobs


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_what_expands_compiles(arch: int, root: Path) -> None:
    jobs = expanding(arch)[1:4]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        assert one.stack <= 16, f"{job.kernel} spills"
        assert one.shared <= 16384, job
        assert one.registers <= 64, job


@pytest.mark.slow
def test_every_variant_of_what_expands_compiles(root: Path) -> None:
    """Sizes that 16 divides, sizes of 1, and words of 32 and 64 bits."""
    count, bitmap, s24, *gemvs = expanding(90)
    jobs = [*expanding(90, unaligned=False), *gemvs[1:]]
    jobs += [with_ones(count, "width"), with_ones(bitmap, "columns", "width", "kept")]
    jobs += [with_ones(s24, "rows", "quads", "chunks"), with_ones(gemvs[0], "units", "chunks")]
    jobs += [
        replace(bitmap, types=bitmap.types | {"values": word, "out": word})
        for word in ("*i32", "*i64")
    ]
    assert all(one.stack <= 16 for one in found(jobs, root))


def test_the_longest_loop_is_found() -> None:
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.WIDE R2, R3, 0x4, R4 ;
        /*0020*/              @!P0 LDG.E R5, [R2.64] ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   BRA.U !UP0, 0x10        &wr=0x2 ?WAIT15_END_GROUP;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60;
"""
    assert longest_loop(sass) == ["IMAD.WIDE", "LDG.E", "BRA", "BRA.U"]
