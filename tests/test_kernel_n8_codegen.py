"""What `n8_mma` becomes on GPUs that are not here: decoded in registers, within its instructions."""

from __future__ import annotations

from pathlib import Path

import pytest
from codegen import ARCHITECTURES, Job, can_compile, found
from test_kernel_codegen import no_detours, warped, with_ones

from llmprune.kernels.n8_layout import COLUMNS, ROWS, TILES

pytest.importorskip("triton", reason="triton is not installed on this platform")

WARPS = 8
WEIGHTS = TILES * ROWS * COLUMNS  # that a warp goes through in a turn
# Instruction slots per dense weight that an H200 has while it reads 9, 7 and 5 bits per weight at 90% of its
# bandwidth, by n; see BUDGET_H200 of test_kernel_codegen.
BUDGET = {4: 7.7, 3: 6.0, 2: 4.3}
# What the loop may take, by tokens and n: what triton 3.7.1 made of it for sm_90, and a tenth.
N8 = {
    (8, 4): 3.1,
    (16, 4): 3.3,
    (64, 4): 4.4,
    (8, 3): 2.7,
    (8, 2): 2.5,
    (64, 2): 3.7,
}


@pytest.fixture(autouse=True)
def _tools() -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")


def n8(
    arch: int, tokens: int, n: int, half: str = "bf16", every: bool = True, parts: bool = False
) -> Job:
    eights = 1 << (-(-tokens // 8) - 1).bit_length()
    value = {"bf16": "*bf16", "f16": "*fp16"}[half]
    types = {"words": "*i32", "x": "*i32", "bias": value, "y": "*fp32" if parts else value}
    sizes = ["chunks", "share", "tokens", "rows"]
    constants: dict[str, int | bool | str] = {"N": n, "WARPS": WARPS, "ACROSS": min(eights, 4)}
    constants |= {"TILES": TILES, "EIGHTS": eights, "HALF": half, "ALL": every}
    constants |= {"BIAS": not parts, "PARTS": parts}
    types |= dict.fromkeys(sizes, "i32")
    return Job("n8_gluon", "n8_kernel", types, constants, WARPS, arch, True, sizes)


def test_it_compiles_to_dense_tensor_cores_without_detours(root: Path) -> None:
    jobs = [with_ones(n8(arch, 1, 4), "tokens") for arch in ARCHITECTURES]
    jobs += [n8(arch, 16, 3, "f16", every=False, parts=True) for arch in (80, 90, 120)]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        no_detours(one)
        half = ".BF16" if job.constants["HALF"] == "bf16" else ""
        assert one.names == [f"HMMA.16816.F32{half}"]
        assert one.loop["HMMA"] == 2 * 8 * TILES * int(job.constants["EIGHTS"])
        # of each half of a group two permutes, and two (4:8) or one that make masks
        assert one.loop["PRMT"] == 8 * TILES * 2 * 2 * (4 if job.constants["N"] == 4 else 3)


@pytest.mark.slow
def test_it_stays_within_its_instructions(root: Path) -> None:
    jobs = [n8(90, *which) for which in N8]
    for (which, most), one in zip(N8.items(), found(jobs, root), strict=True):
        no_detours(one)
        assert one.stack == 0
        took = one.per_weight(WEIGHTS)
        assert took <= most <= BUDGET[which[1]], f"{which}: {took:.2f} slots, {one.loop}"
        # Half of a processor's lanes permute, shift and mask: these must fit in twice the time.
        narrow = sum(one.loop.get(name, 0) for name in ("PRMT", "LOP3", "SHF")) * 32 / WEIGHTS
        assert 2 * narrow <= BUDGET[which[1]], f"{which}: {narrow:.2f} slots, {one.loop}"


@pytest.mark.slow
def test_every_variant_compiles(root: Path) -> None:
    """What the launchers may ask for beside what the tests above look into, for one GPU."""
    jobs = [
        n8(90, 16, 2, "f16", every=False),
        n8(90, 32, 4, "f16", every=False, parts=True),
        with_ones(n8(90, 1, 2, every=False), "tokens", "chunks", "share", "rows"),
        with_ones(n8(90, 1, 3, parts=True), "tokens", "chunks", "share", "rows"),
        *(warped(n8(90, 16, 3), warps) for warps in (4, 16)),
    ]
    assert all(one.stack <= 16 for one in found(jobs, root))


def expanding(arch: int, n: int, unaligned: bool = True) -> Job:
    sizes = ["rows", "quads", "chunks"]
    types = {"words": "*i32", "out": "*i64"} | dict.fromkeys(sizes, "i32")
    odd = sizes if unaligned else []
    return Job("n8_triton", "n8_kernel", types, {"N": n}, 4, arch, False, odd)


def test_what_expands_compiles(root: Path) -> None:
    jobs = [expanding(arch, 3) for arch in (80, 89, 90, 100)]
    jobs += [expanding(90, 4, unaligned=False)]
    jobs += [with_ones(expanding(90, 2), "rows", "quads", "chunks")]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        assert one.stack <= 16, f"{job} spills"
        assert one.shared <= 16384, job
        assert one.registers <= 80, job
