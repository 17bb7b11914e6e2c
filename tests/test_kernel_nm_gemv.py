"""The n:m product for few tokens: its packing bit for bit, its result against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from kernel_harness import (
    MASKS,
    TOKENS_ON_GPU,
    amid_poison,
    assert_as_good_as_dense,
    assert_within,
    bits,
    nm_matrix,
    truth,
)
from torch import Tensor

from llmprune.kernels import slots as slots_module
from llmprune.kernels.gemv_layout import GemvLayout, pack_gemv, unpack_gemv
from llmprune.kernels.nm_gemv import add_parts, nm_gemv, nm_gemv_reference
from llmprune.kernels.packed import pack, unpack

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
PATTERNS = [(2, 4), (1, 2), (1, 4), (3, 4), (4, 8), (3, 8), (2, 8), (8, 16), (5, 16), (12, 16)]
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


def layout_of(dense: Tensor, n: int, m: int) -> GemvLayout:
    return pack_gemv(pack(dense), n, m)


@pytest.mark.parametrize(("n", "m"), PATTERNS, **ids)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (32, 16), (37, 11), (64, 33)], **ids)
def test_what_is_packed_comes_back(shape: tuple[int, int], mask: str, n: int, m: int) -> None:
    rows, groups = shape
    dense = nm_matrix(rows, groups * m, n, m, HALVES[rows % 2], mask)
    layout = layout_of(dense, n, m)
    back = unpack_gemv(layout)
    assert torch.equal(bits(unpack(back)), bits(dense))
    assert torch.equal(back.bitmap, pack(dense).bitmap)
    assert layout.bytes == layout.words.numel() * 4


def test_in_blocks_of_rows_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = nm_matrix(150, 64, 2, 4, torch.bfloat16)
    whole = layout_of(dense, 2, 4)
    monkeypatch.setattr(slots_module, "BLOCK", 64 * 64)
    assert torch.equal(layout_of(dense, 2, 4).words, whole.words)
    assert torch.equal(unpack(unpack_gemv(whole)), dense)


@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_every_bit_pattern_survives(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    dense = torch.zeros(256, 256, 2, dtype=dtype)
    dense[..., 1] = every.reshape(256, 256)
    dense = dense.reshape(256, 512)
    assert torch.equal(bits(unpack(unpack_gemv(layout_of(dense, 2, 4)))), bits(dense))


def test_bits_of_a_2_to_4_matrix() -> None:
    layout = layout_of(nm_matrix(64, 1024, 2, 4, torch.bfloat16), 2, 4)
    assert layout.bytes * 8 == 9 * 64 * 1024


def test_each_word_is_where_a_lane_looks() -> None:
    """Brute force, from the words that the docstring of the layout promises."""
    dense = nm_matrix(40, 96, 2, 4, torch.float16, "fewer")
    words = layout_of(dense, 2, 4).words.tolist()
    found = torch.zeros(64, 96, dtype=torch.float16)
    for row in range(64):
        for group in range(24):
            chunk, inside = divmod(group, 8)  # 16 values of a row, of 8 groups
            of_row = [word[row % 32] & 0xFFFFFFFF for word in words[row // 32][chunk]]
            pair = torch.tensor([of_row[1 + inside]], dtype=torch.uint32).view(torch.float16)
            for i in (0, 1):
                place = (of_row[0] >> (4 * inside + 2 * i)) & 3
                found[row, 4 * group + place] += pair[i]
    assert torch.equal(found[:40], dense)
    assert not found[40:].any()


def test_minus_zero_takes_a_place_while_there_is_one() -> None:
    zero = -0.0
    dense = torch.tensor([[1, zero, 0, 0, 1, 2, zero, 0, zero, zero, zero, zero]]).bfloat16()
    back = unpack(unpack_gemv(layout_of(dense, 2, 4)))
    expected = torch.tensor([[1, zero, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]]).bfloat16()
    assert torch.equal(bits(back), bits(expected))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8)], **ids)
def test_a_matrix_of_another_pattern_is_refused(n: int, m: int) -> None:
    dense = nm_matrix(4, 4 * m, n, m, torch.bfloat16)
    dense[1, :m] = 1
    with pytest.raises(ValueError, match=rf"not {n}:{m}: 1 of 16 groups keep more than {n}"):
        layout_of(dense, n, m)


@pytest.mark.parametrize(
    ("dense", "n", "m", "message"),
    [
        (torch.zeros(2, 6).bfloat16(), 2, 4, "multiple of 4 weights, got 6"),
        (torch.zeros(2, 8), 2, 4, "float32"),
        (torch.zeros(2, 64).bfloat16(), 16, 32, "16:32"),
        (torch.zeros(2, 8).bfloat16(), 4, 4, "4:4"),
        (torch.zeros(2, 64).bfloat16(), 13, 16, "13:16 takes no less"),
        (torch.zeros(2, 2, 8).bfloat16(), 2, 4, r"\[2, 2, 8\]"),
    ],
)
def test_what_it_cannot_pack_is_refused(dense: Tensor, n: int, m: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(dense, n, m)


def test_what_does_not_fit_the_matrix_is_refused() -> None:
    layout = layout_of(torch.zeros(3, 8).bfloat16(), 2, 4)
    for x, bias, message in [
        (torch.zeros(9, 8).bfloat16(), None, r"\[9, 8\]"),
        (torch.zeros(0, 8).bfloat16(), None, r"\[0, 8\]"),
        (torch.zeros(1, 4).bfloat16(), None, r"\[1, 4\]"),
        (torch.zeros(1, 8).half(), None, "float16"),
        (torch.zeros(1, 8, device="meta").bfloat16(), None, "on meta"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4), r"3 rows has shape \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            nm_gemv(x, layout, bias)


# Interpreted, every call takes about half a second. So each case stands for what only it has.
CASES = {
    "one token": (1, 32, 256, 2, 4, 2, 1, torch.bfloat16),
    "one row, one group": (1, 1, 4, 2, 4, 2, 1, torch.bfloat16),
    "two tokens, float16": (2, 32, 64, 2, 4, 1, 1, torch.float16),
    "three tokens, ragged rows": (3, 37, 128, 2, 4, 4, 1, torch.bfloat16),
    "eight tokens": (8, 64, 128, 2, 4, 4, 1, torch.float16),
    "five tokens, columns that no chunk divides": (5, 33, 76, 2, 4, 2, 1, torch.bfloat16),
    "fewer chunks than warps": (1, 32, 32, 2, 4, 8, 1, torch.bfloat16),
    "split": (1, 40, 512, 2, 4, 2, 4, torch.bfloat16),
    "split unevenly, seven tokens": (7, 40, 352, 2, 4, 2, 4, torch.float16),
    "4:8": (1, 32, 88, 4, 8, 2, 1, torch.float16),
    "3:8": (4, 5, 64, 3, 8, 1, 2, torch.bfloat16),
    "8:16": (8, 32, 96, 8, 16, 2, 1, torch.bfloat16),
    "5:16": (1, 32, 272, 5, 16, 2, 1, torch.bfloat16),
    "12:16": (2, 3, 16, 12, 16, 1, 1, torch.bfloat16),
    "1:2": (1, 32, 64, 1, 2, 1, 1, torch.bfloat16),
    "1:4": (3, 8, 64, 1, 4, 1, 1, torch.float16),
}


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_float64(
    case: str, device: torch.device, poisoned: Unwritten
) -> None:
    tokens, rows, columns, n, m, warps, split, dtype = CASES[case]
    dense = nm_matrix(rows, columns, n, m, dtype, "fewer").to(device)
    layout = layout_of(dense, n, m)
    layout = GemvLayout(amid_poison(layout.words), layout.shape, layout.dtype, layout.chunk)
    torch.manual_seed(0)
    x = amid_poison(torch.randn(tokens, columns).to(device, dtype))
    bias = amid_poison(torch.randn(rows).to(device, dtype)) if tokens % 2 else None
    y = nm_gemv(x, layout, bias, warps=warps, split=split)
    assert poisoned(y) == 0
    exact = truth(x, dense, bias)
    assert_within(y, *exact)
    assert_within(nm_gemv_reference(x, layout, bias), *exact)


def test_infinite_and_nan_weights_show(device: torch.device) -> None:
    dense = nm_matrix(3, 32, 2, 4, torch.bfloat16).to(device)
    dense[0].masked_fill_(dense[0] != 0, float("inf"))
    dense[1].masked_fill_(dense[1] != 0, float("nan"))
    y = nm_gemv(torch.ones(1, 32, device=device).bfloat16(), layout_of(dense, 2, 4), warps=1)
    assert y[0, 0] == float("inf")
    assert y[0, 1].isnan()
    assert y[0, 2].isfinite()


def test_inputs_and_bias_on_any_address(device: torch.device) -> None:
    layout = layout_of(nm_matrix(32, 32, 2, 4, torch.bfloat16).to(device), 2, 4)
    x = torch.randn(2 * 32 + 1, device=device).bfloat16()[1:].reshape(2, 32)
    bias = torch.randn(2, 32, device=device).T[:, 0]  # neighbours lie two apart
    plain = nm_gemv(x.clone(), layout, bias.clone(), warps=1)
    assert torch.equal(nm_gemv(x.T.contiguous().T, layout, bias, warps=1), plain)
    assert torch.equal(nm_gemv(x[:1], layout, bias, warps=1), plain[:1])


@pytest.mark.parametrize("gated", [False, True])
def test_parts_are_added_in_float32(gated: bool, device: torch.device, poisoned: Unwritten) -> None:
    torch.manual_seed(0)
    parts = amid_poison(torch.randn(3, 2, 2 * 300, device=device))
    bias = amid_poison(torch.randn(2 * 300, device=device).bfloat16())
    y = torch.empty(2, 300 if gated else 600, dtype=torch.float32, device=device)
    add_parts(parts, y, bias, gated)
    assert poisoned(y) == 0
    exact = parts.double().sum(0) + bias.double()
    if gated:
        exact = torch.nn.functional.silu(exact[:, :300]) * exact[:, 300:]
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@cache
def layer_on_gpu(shape: tuple[int, int], n: int, m: int) -> tuple[Tensor, GemvLayout]:
    """Once for all numbers of tokens."""
    dense = nm_matrix(*shape, n, m, torch.bfloat16, device="cuda")
    layout = layout_of(dense, n, m)
    assert torch.equal(unpack(unpack_gemv(layout)), dense)
    return dense, layout


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16)], **ids)
@pytest.mark.parametrize("tokens", [t for t in TOKENS_ON_GPU if t <= 8])
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (11008, 4096)], **ids)
def test_on_a_gpu_at_the_size_of_a_layer(
    shape: tuple[int, int], tokens: int, n: int, m: int, poisoned: Unwritten
) -> None:
    """The twin of the interpreted test, a hundred times the same."""
    dense, layout = layer_on_gpu(shape, n, m)
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    bias = torch.randn(shape[0], device="cuda").bfloat16()
    for shift in (None, bias):
        y = nm_gemv(x, layout, shift)
        assert poisoned(y) == 0
        assert_as_good_as_dense(y, x, dense, shift)
        for _ in range(100):
            assert torch.equal(nm_gemv(x, layout, shift), y)
