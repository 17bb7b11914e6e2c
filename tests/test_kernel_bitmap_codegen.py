"""What `bitmap` becomes on GPUs that are not here: the gate before one is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from codegen import Found, Job, can_compile, found
from test_kernel_codegen import no_detours, with_ones

from llmprune.kernels.bitmap import launch_of
from llmprune.kernels.bitmap_layout import WORD

pytest.importorskip("triton", reason="triton is not installed on this platform")

# What the loop may take, by tokens and n of 32 (0: any mask): what triton 3.7.1 made of it for sm_90, and a
# tenth. A 3090 has 24 slots while it reads 9 bits per weight at 90% of its bandwidth, a 4090 51.
BITMAP = {(1, 0): 9.1, (1, 16): 8.5, (8, 0): 19.1, (16, 0): 29.3}
BUDGET_4090 = 51


@pytest.fixture(autouse=True)
def _tools() -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")


def bitmap(
    arch: int,
    tokens: int,
    n: int,
    even: bool = True,
    of: str = "*bf16",
    offsets: str = "*i32",
    split: int = 1,
) -> Job:
    launch = launch_of(tokens)
    types = {"words": "*i32", "values": of, "offsets": offsets}
    types |= {"x": of if tokens == 1 else "*fp32", "bias": of, "y": of if split == 1 else "*fp32"}
    types |= dict.fromkeys(("rows", "turns", "tokens", "of_row"), "i32")
    constants = {
        "N": n,
        "ROWS": launch.rows,
        "WORDS": launch.words,
        "TOKENS": launch.wide,
        "TILES": launch.tiles,
    }
    constants |= {"WARPS": launch.warps, "EVEN": even, "BIAS": split == 1}
    unaligned = ["tokens", "of_row"] if even else ["rows", "turns", "tokens", "of_row"]
    types |= {"split": "i32"}
    job = Job(
        "bitmap_triton",
        "bitmap_kernel",
        types,
        constants,
        launch.warps,
        arch,
        False,
        [*unaligned, "split"],
    )
    return with_ones(job, "split") if split == 1 else job


def weights(job: Job) -> int:
    """That a warp goes through in a turn of the loop."""
    return 4 * int(job.constants["ROWS"]) * int(job.constants["WORDS"]) * WORD


def no_more_than_needed(job: Job, one: Found) -> None:
    """A word is read once, counted twice (n:32: once), and four values are read for four bits of it."""
    no_detours(one)
    rows, words, tiles = (int(job.constants[name]) for name in ("ROWS", "WORDS", "TILES"))
    assert one.loop["LDG"] <= 5 * words * rows + 4 * words * tiles + rows
    assert one.loop["POPC"] <= words * rows * (1 if job.constants["N"] else 2)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100])
def test_bitmap_compiles_without_detours(arch: int, root: Path) -> None:
    job = bitmap(arch, 8, 16, even=False, of="*fp16")
    (one,) = found([job], root)
    no_more_than_needed(job, one)
    assert one.registers <= 128


@pytest.mark.slow
def test_bitmap_stays_within_its_instructions(root: Path) -> None:
    jobs = [bitmap(90, *which) for which in BITMAP]
    for (which, most), job, one in zip(BITMAP.items(), jobs, found(jobs, root), strict=True):
        no_more_than_needed(job, one)
        took = one.per_weight(weights(job))
        assert took <= most < BUDGET_4090, f"{which}: {took:.2f} slots per weight, {one.loop}"


@pytest.mark.slow
def test_every_variant_compiles(root: Path) -> None:
    """What the launcher may ask for beside what the tests above look into."""
    four = bitmap(90, 8, 0)
    jobs = [
        with_ones(bitmap(120, 1, 1, even=False), "tokens", "turns", "rows", "of_row"),
        bitmap(89, 8, 0, of="*fp32", offsets="*i64"),
        bitmap(100, 8, 9, split=2),
        bitmap(80, 16, 16, even=False),
        replace(four, warps=4, constants=four.constants | {"WARPS": 4}),
    ]
    for job, one in zip(jobs, found(jobs, root), strict=True):
        no_detours(one)
        assert one.stack <= 16, job


def test_the_counted_slots_are_those_of_the_gate(root: Path) -> None:
    """benchmarks/results/slots_bitmap.json is of every case that is bounded here."""
    result = json.loads((root / "benchmarks" / "results" / "slots_bitmap.json").read_text())
    most = {(t, f"{n}:32" if n else "any"): bound for (t, n), bound in BITMAP.items()}
    for arch in (80, 89, 90, 100):
        of = [row for row in result["rows"] if row["arch"] == arch]
        assert [(row["tokens"], row["pattern"]) for row in of] == list(most)
        for row, bound in zip(of, most.values(), strict=True):
            assert row["spilled_bytes"] <= 16
            assert row["slots_per_weight"] <= (bound if arch == 90 else BUDGET_4090)
    assert " + changes" not in result["commit"]
