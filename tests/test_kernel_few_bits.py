"""Whole numbers times scales in memory: what they stand for is what docs/format.md and the checkpoint say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_harness import bits as bytes_of
from torch import Tensor

from llmprune.checkpoint.sparse import NAMES, Spec
from llmprune.checkpoint.whole import found_in, spread
from llmprune.kernels import slots as slots_module
from llmprune.kernels.few_bits import (
    FewBits,
    dense_whole,
    expand_few,
    expand_unasked,
    in_halves,
    pack_few,
    packed_few,
    products,
    top_of,
)
from llmprune.kernels.packed import pack, pack_bits, unpack, unpack_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


def few_bits(
    shape: tuple[int, int],
    bits: int,
    group: int,
    dtype: torch.dtype,
    axis: str = "rows",
    seed: int = 0,
    device: str = "cpu",
) -> tuple[FewBits, Tensor]:
    """A 2:4 matrix of all whole numbers, zero among them; and the dense truth, by numpy and the format."""
    random = np.random.default_rng(seed)
    rows, columns = shape
    order = random.random((rows, -(-columns // 4), 4)).argsort(-1)
    keep = (order < random.integers(1, 3, (rows, 1, 1))).reshape(rows, -1)[:, :columns]
    whole = random.integers(-top_of(bits), top_of(bits) + 1, shape)
    wide, tall = (rows, -(-columns // group)), (-(-rows // group), columns)
    scales = random.uniform(0.0001, 0.1, wide if axis == "rows" else tall)
    scales = torch.from_numpy(scales).bfloat16()
    each = scales.double().numpy().repeat(group, 1 if axis == "rows" else 0)[:rows, :columns]
    dense = torch.from_numpy(np.where(keep, whole * each, 0.0)).to(dtype)
    kept = torch.from_numpy(whole[keep]).to(torch.int8)
    few = FewBits(
        kept if bits == 8 else in_halves(kept),
        scales,
        pack_bits(torch.from_numpy(keep)),
        shape,
        bits,
        group,
        dtype,
        axis,
    )
    return few.to(device), dense.to(device)


CASES = [
    ((1, 4), 8, 4, "rows"),
    ((37, 300), 8, 300, "rows"),
    ((37, 300), 4, 128, "rows"),
    ((64, 41), 4, 3, "rows"),
    ((37, 44), 8, 5, "columns"),
    ((60, 16), 4, 32, "columns"),
]


@pytest.mark.parametrize("dtype", DTYPES, **ids)
@pytest.mark.parametrize(("shape", "bits", "group", "axis"), CASES, **ids)
def test_it_stands_for_what_the_checkpoint_means(
    shape: tuple[int, int],
    bits: int,
    group: int,
    axis: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, dense = few_bits(shape, bits, group, dtype, axis)
    monkeypatch.setattr(slots_module, "BLOCK", 7 * shape[1])  # in more than one go
    assert torch.equal(expand_few(few), dense)
    keep = unpack_bits(few.bitmap, shape[1])
    spec = Spec(shape, NAMES[dtype], "2:4", axis, int(keep.sum()), bits, group)
    whole = dense_whole(few)
    theirs = products(whole[keep], spread(few.scales, spec, 0, shape[0]), few.bitmap, dtype)
    assert torch.equal(bytes_of(packed_few(few).values), bytes_of(theirs))
    found = found_in(dense, spec, 0)
    assert found is not None
    again = pack_few(pack(dense), found.scales, bits, group, axis)
    assert torch.equal(expand_few(again), dense)
    assert torch.equal(dense_whole(again)[dense != 0], found.whole)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_was_packed_comes_back(bits: int) -> None:
    few, _ = few_bits((33, 260), bits, 100, torch.bfloat16)
    back = pack_few(packed_few(few), few.scales, bits, 100)
    assert torch.equal(back.whole, few.whole)
    assert torch.equal(back.bitmap, few.bitmap)


def test_expanding_for_a_gpu_asks_for_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    few, dense = few_bits((9, 300), 4, 64, torch.float16)
    assert expand_few(few.to("meta")).shape == dense.shape  # a value that was asked for would raise
    monkeypatch.setattr(slots_module, "BLOCK", 2 * 300)
    assert torch.equal(bytes_of(expand_unasked(few)), bytes_of(dense + 0.0))


def test_a_scale_of_zero_gives_zeros_of_either_sign() -> None:
    few, _ = few_bits((4, 8), 8, 8, torch.bfloat16)
    few = replace(few, scales=torch.zeros_like(few.scales))
    dense = unpack(packed_few(few))
    assert not dense.any()
    negative = dense_whole(few) < 0
    assert torch.equal(torch.signbit(dense), negative)


def test_what_does_not_fit_is_refused() -> None:
    few, dense = few_bits((8, 64), 8, 16, torch.bfloat16)
    for change, message in [
        ({"bits": 3}, "3 bits"),
        ({"group": 65}, "groups of 65"),
        ({"axis": "both"}, "along both"),
        ({"scales": few.scales.float()}, "scales is torch.float32"),
        ({"scales": few.scales[:, 1:]}, r"scales is torch.bfloat16 \[8, 3\]"),
        ({"bits": 4}, "whole is torch.int8"),
        ({"whole": few.whole[1:]}, "one bits, and there are"),
        ({"bitmap": few.bitmap[1:]}, r"bitmap is torch.uint8 \[7, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            expand_few(replace(few, **change))
    for weight, scales, message in [
        (dense + dense.abs().max() / 300, few.scales, "no whole number of 8 bits"),
        (dense, few.scales / 2, "no whole number of 8 bits"),
        (dense.expand(2, 8, 64), few.scales, r"\[2, 8, 64\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_few(pack(weight), scales, 8, 16)
    minus_zero = pack(torch.tensor([[-0.0, 1.0]]).bfloat16())
    with pytest.raises(ValueError, match="no whole number"):
        pack_few(minus_zero, torch.ones(1, 1).bfloat16(), 8, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, **ids)
def test_on_a_gpu_no_host_waits(dtype: torch.dtype) -> None:
    few, dense = few_bits((333, 1100), 4, 128, dtype, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = expand_few(few)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, dense)
