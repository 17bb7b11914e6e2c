"""What the kernel for 2:4 in int8 and int4 becomes on GPUs that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest
from codegen import ARCHITECTURES, Job, can_compile, found
from test_kernel_codegen import WARPS, no_detours, warped, with_ones

from llmprune.kernels.s24_bits import tiles_of_warp
from llmprune.kernels.s24_layout import COLUMNS, ROWS

# Slots per dense weight that an H200 has while it reads 5 or 3.125 bits of it, as BUDGET_H200 says it of 9.
BUDGETS = {8: 4.3, 4: 2.7}
# What the loop may take, by bits and tokens: what triton 3.7.1 made of it for sm_90, and a tenth.
BITS = {
    (8, 8): 1.45,
    (8, 16): 1.85,
    (8, 32): 2.65,
    (8, 64): 4.15,
    (4, 8): 1.61,
    (4, 16): 2.02,
    (4, 32): 2.16,
    (4, 64): 4.4,  # more than an H200 has: bound by instructions there
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")


def s24_bits(
    arch: int,
    bits: int,
    tokens: int,
    half: str = "bf16",
    every: bool = True,
    parts: bool = False,
    span: int | None = None,
) -> Job:
    """The kernel as `s24_bits` launches it: int8 with a scale of the row, int4 with one of 128 columns."""
    eights = 1 << (-(-tokens // 8) - 1).bit_length()
    value = {"bf16": "*bf16", "f16": "*fp16"}[half]
    types = {"words": "*i32", "scales": "*i16", "x": "*i32", "bias": value}
    types["y"] = "*fp32" if parts else value
    types |= dict.fromkeys(("chunks", "share", "tokens", "rows"), "i32")
    constants: dict[str, int | bool | str] = {"WARPS": WARPS, "ACROSS": min(eights, 4)}
    constants |= {"TILES": tiles_of_warp(bits, eights, 16), "EIGHTS": eights, "BITS": bits}
    constants["SPAN"] = (0 if bits == 8 else 128) if span is None else span
    constants |= {"HALF": half, "ALL": every, "BIAS": not parts, "PARTS": parts}
    unaligned = ["chunks", "share", "tokens", "rows"]
    return Job("s24_bits_gluon", "bits_kernel", types, constants, WARPS, arch, True, unaligned)


def weights(job: Job) -> int:
    """That a warp goes through in a turn."""
    return int(job.constants["TILES"]) * ROWS * COLUMNS


QUICK = (80, 90, 100)
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHITECTURES if arch not in QUICK]


@pytest.mark.parametrize("arch", [*QUICK, *SLOW])
def test_it_compiles_to_sparse_tensor_cores(arch: int, root: Path) -> None:
    jobs = [
        with_ones(s24_bits(arch, 8, 1), "tokens"),
        s24_bits(arch, 4, 32, "f16", every=False),
    ]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        no_detours(one, {"SHFL"})  # neighbours trade halves of the inputs
        half = ".BF16" if job.constants["HALF"] == "bf16" else ""
        assert one.names == [f"HMMA.SP.16832.F32{half}"]
        eights, tiles = int(job.constants["EIGHTS"]), int(job.constants["TILES"])
        assert one.loop["HMMA"] == 8 * tiles * eights  # steps of a chunk, each once
        assert one.loop["SHFL"] == 8 * 2 * eights
        slabs = 1 + int(job.constants["BITS"]) // 2
        scales = 1 if job.constants["SPAN"] else 0
        assert one.loop["LDG"] == tiles * (slabs + scales) + 8 * eights  # each of 16 bytes, or 8


@pytest.mark.slow
def test_it_stays_within_its_instructions(root: Path) -> None:
    jobs = [s24_bits(90, *which) for which in BITS]
    for (which, most), job, one in zip(BITS.items(), jobs, found(jobs, root), strict=True):
        no_detours(one, {"SHFL"})
        assert one.stack == 0
        took = one.per_weight(weights(job))
        assert took <= most, f"{which}: {took:.2f} slots per weight, {one.loop}"
        assert took <= BUDGETS[which[0]] or which == (4, 64)


@pytest.mark.slow
def test_every_variant_compiles(root: Path) -> None:
    """What the launcher may ask for beside what the tests above look into, for one GPU."""
    jobs = [
        *(s24_bits(90, bits, 16, "f16", False, span=span) for bits in (8, 4) for span in (32, 64)),
        s24_bits(90, 8, 64, parts=True, span=128),
        s24_bits(90, 4, 64, "f16", every=False, span=0),
        with_ones(s24_bits(90, 4, 1, every=False), "tokens", "chunks", "share", "rows"),
        with_ones(s24_bits(90, 8, 1, parts=True), "tokens", "chunks", "share", "rows"),
        *(warped(s24_bits(90, bits, 16), warps) for bits in (8, 4) for warps in (4, 16)),
    ]
    assert all(one.stack <= 16 for one in found(jobs, root))
