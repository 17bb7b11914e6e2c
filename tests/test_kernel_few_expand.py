"""Expanding whole numbers of few bits on a GPU: the Triton kernels, bit for bit what plain torch gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from codegen import Job, can_compile, found
from kernel_harness import amid_poison, bits
from test_kernel_few_bits import CASES as SMALL
from test_kernel_few_bits import few_bits
from torch import Tensor

from llmprune.kernels import few_expand
from llmprune.kernels.few_bits import expand_few
from llmprune.kernels.few_expand import dense_of_few, from_few, from_s24_bits
from llmprune.kernels.s24_bits_layout import dense_s24_bits, pack_s24_bits

Unwritten = Callable[[Tensor], int]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [*SMALL, ((3, 1100), 8, 7, "rows"), ((5, 1100), 4, 128, "rows"), ((9, 70), 8, 70, "rows")]
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_from_a_bitmap(case: int, device: torch.device, poisoned: Unwritten) -> None:
    few, _ = few_bits(*CASES[case][:3], DTYPES[case % 3], CASES[case][3])
    expected = bits(expand_few(few))
    few = few.to(device)
    around = {n: amid_poison(getattr(few, n)) for n in ("whole", "scales")}
    assert torch.equal(bits(from_few(replace(few, **around)).cpu()), expected)


def test_a_bitmap_that_asks_for_too_much_gets_zeros(device: torch.device) -> None:
    few, dense = few_bits((4, 64), 8, 64, torch.bfloat16)
    few = few.to(device)
    out = from_few(replace(few, whole=amid_poison(few.whole[:-3].contiguous()))).cpu()
    assert 0 < int((out != dense).sum()) <= 3
    assert not from_few(replace(few, whole=few.whole[:0])).any()


@pytest.mark.parametrize("dtype", DTYPES[:2], **ids)
@pytest.mark.parametrize(
    ("shape", "number", "group"),
    [
        ((1, 4), 8, 4),
        ((37, 300), 8, 300),
        ((37, 300), 4, 128),
        ((33, 1284), 4, 96),
        ((20, 520), 8, 64),
        ((16, 512), 4, 512),
    ],
)
def test_from_the_layout(
    shape: tuple[int, int],
    number: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
    poisoned: Unwritten,
) -> None:
    few, dense = few_bits(shape, number, group, dtype)
    few = replace(few, scales=few.scales.clamp(min=2.0**-12))  # that float16 holds
    layout = pack_s24_bits(few.to(device))
    expected = dense_s24_bits(layout)
    layout = replace(layout, words=amid_poison(layout.words), scales=amid_poison(layout.scales))
    assert torch.equal(bits(from_s24_bits(layout)), bits(expected))
    assert torch.equal(expected.cpu() != 0, dense != 0)


def test_the_trial_before_use_finds_a_wrong_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert few_expand._wrong(device) is None
    monkeypatch.setattr(few_expand, "from_few", lambda few: from_few(few) * -1)
    assert few_expand._wrong(device) == "the expansion of int8 for the bitmap"


def test_what_fails_its_trial_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    few, dense = few_bits((8, 64), 4, 32, torch.bfloat16)
    monkeypatch.setattr(few_expand, "unavailable", lambda device: "is old")
    for name in ("from_few", "from_s24_bits"):
        monkeypatch.setattr(few_expand, name, lambda held: pytest.fail("it failed its trial"))
    assert few_expand.how(torch.device("cpu")) == "by plain torch (is old)"
    assert torch.equal(dense_of_few(few), dense)
    assert torch.equal(dense_of_few(pack_s24_bits(few)), dense)


def expanding(arch: int, unaligned: bool = True) -> list[Job]:
    """Both kernels, for int8 and int4."""
    jobs = []
    for number, half, group in ((8, "bf16", 0), (4, "f16", 128)):
        sizes = ("columns", "width", "kept", "groups", "group")
        types = {"bitmap": "*u8", "whole": "*i8" if number == 8 else "*u8", "scales": "*bf16"}
        types |= {"counts": "*i32", "ends": "*i64", "out": "*i16"} | dict.fromkeys(sizes, "i32")
        constants: dict[str, int | bool | str] = {"BITS": number, "ALONG": False, "DTYPE": half}
        odd = list(sizes) if unaligned else []
        jobs.append(
            Job(
                "few_expand_triton",
                "few_kernel",
                types,
                constants | {"BYTES": 128},
                4,
                arch,
                unaligned=odd,
            )
        )
        sizes = ("rows", "quads", "chunks")
        scale = {"bf16": "*bf16", "f16": "*fp16"}[half]
        types = {"words": "*i32", "scales": scale, "out": "*i64"} | dict.fromkeys(sizes, "i32")
        constants = {"BITS": number, "SPAN": group, "DTYPE": half}
        odd = list(sizes) if unaligned else []
        jobs.append(
            Job("few_expand_triton", "bits_kernel", types, constants, 4, arch, unaligned=odd)
        )
    return jobs


SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89, 100)]


@pytest.mark.parametrize("arch", [90, *SLOW])
def test_what_expands_compiles(arch: int, root: Path) -> None:
    if not can_compile():
        pytest.skip("the ptxas and cuobjdump that triton ships do not run here")
    jobs = expanding(arch, unaligned=arch != 90)
    for job, one in zip(jobs, found(jobs, root), strict=True):
        assert one.stack <= 16, f"{job.kernel} spills"
        assert one.shared <= 16384, job
        assert one.registers <= 96, job


@pytest.mark.gpu
@pytest.mark.parametrize("number", [8, 4])
def test_on_a_gpu_no_host_waits(number: int) -> None:
    few, dense = few_bits((4096, 4096), number, 128, torch.bfloat16, device="cuda")
    layout = pack_s24_bits(few)
    assert few_expand.unavailable(torch.device("cuda", torch.cuda.current_device())) is None
    torch.cuda.set_sync_debug_mode("error")
    try:
        found_in = [dense_of_few(few), dense_of_few(layout), dense_s24_bits(layout)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for given in found_in:
        assert torch.equal(given, dense)
