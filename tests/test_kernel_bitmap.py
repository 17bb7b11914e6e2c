"""The product with any mask for few tokens: its packing bit for bit, its result against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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

from llmprune.kernels import bitmap, bitmap_layout
from llmprune.kernels import slots as slots_module
from llmprune.kernels.bitmap import bitmap_gemv, bitmap_gemv_reference
from llmprune.kernels.bitmap_layout import (
    BEHIND,
    BitmapLayout,
    bits_per_weight,
    exact,
    ones,
    pack_bitmap,
    pack_exact,
    unpack_bitmap,
)
from llmprune.kernels.packed import Packed, pack, unpack, unpack_bits

Unwritten = Callable[[Tensor], int]
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


def any_matrix(
    rows: int, columns: int, dtype: torch.dtype, kept: float = 0.5, seed: int = 0
) -> Tensor:
    """Each row keeps another share, the second none, the third all."""
    random = torch.Generator().manual_seed(seed)
    share = (kept * 2 * torch.rand(rows, 1, generator=random)).clamp(0, 1)
    share[1:2], share[2:3] = 0, 1
    keep = torch.rand(rows, columns, generator=random) < share
    return torch.randn(rows, columns, generator=random).masked_fill(~keep, 0).to(dtype)


def layout_of(dense: Tensor, n: int = 0) -> BitmapLayout:
    packed = pack(dense)
    if n:
        return exact(pack_exact(packed, n), (len(dense), dense.shape[1]), n, dense.dtype)
    return pack_bitmap(packed)


def same(a: Packed, b: Packed) -> bool:
    return (
        a.shape == b.shape
        and torch.equal(a.bitmap, b.bitmap)
        and torch.equal(bits(a.values), bits(b.values))
    )


@pytest.mark.parametrize("dtype", FLOATS, **ids)
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (3, 300), (40, 512), (37, 1100)], **ids)
@pytest.mark.parametrize("fill", [0.0, -0.0, float("nan"), float("inf"), None], **ids)
def test_what_is_packed_comes_back(
    shape: tuple[int, int], dtype: torch.dtype, fill: float | None
) -> None:
    """Any bits under any mask: kept zeros of both signs, NaN with its payload; empty and full rows."""
    keep = any_matrix(*shape, torch.float32) != 0
    random = torch.Generator().manual_seed(1)
    width = WIDTHS[dtype]
    info = torch.iinfo(width)
    words = torch.randint(info.min, info.max, shape, generator=random, dtype=width)
    if fill is not None:
        some = torch.rand(shape, generator=random) < 0.3
        words = torch.where(some, torch.tensor(fill).to(dtype).view(width), words)
    packed = pack(torch.where(keep, words, 0).view(dtype), keep)
    layout = pack_bitmap(packed)
    back = unpack_bitmap(layout)
    assert same(back, packed)
    assert not {back.values.data_ptr(), back.bitmap.data_ptr()} & {
        part.data_ptr() for part in (layout.values, layout.words) if part.numel()
    }
    assert layout.values.numel() == packed.values.numel() + BEHIND


@pytest.mark.parametrize("n", [1, 10, 16, 29])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (37, 11), (64, 16)], **ids)
def test_n_of_32_comes_back(shape: tuple[int, int], mask: str, n: int) -> None:
    dense = nm_matrix(shape[0], shape[1] * 32, n, 32, FLOATS[shape[0] % 2], mask)
    back = layout_of(dense, n).packed
    assert torch.equal(bits(unpack(back)), bits(dense))
    kept = unpack_bits(back.bitmap, dense.shape[1]).reshape(shape[0], -1, 32).sum(-1)
    assert (kept == n).all()  # short groups are filled up


def test_in_blocks_of_rows_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(nm_matrix(70, 96, 16, 32, torch.bfloat16, "fewer"))
    whole = pack_exact(packed, 16)
    monkeypatch.setattr(slots_module, "BLOCK", 16 * 96)
    assert torch.equal(pack_exact(packed, 16), whole)


def test_bits_per_weight() -> None:
    """Of rows of whole turns: nothing is padded but a few values."""
    dense = nm_matrix(64, 1024, 16, 32, torch.bfloat16)
    for n, expected in ((0, 9.125), (16, 9.0)):
        assert bits_per_weight(0.5, n=n) == expected
        over = layout_of(dense, n).bytes * 8 / dense.numel() - expected
        assert 0 < over < 0.04, over


def test_whole_rows_of_words_are_not_copied() -> None:
    packed = pack(any_matrix(8, 512, torch.bfloat16))
    layout = pack_bitmap(packed)
    assert layout.words.data_ptr() == packed.bitmap.data_ptr()
    shifted = torch.cat([packed.bitmap.new_zeros(1), packed.bitmap.flatten()])[1:].view(8, 64)
    other = pack_bitmap(replace(packed, bitmap=shifted))  # no word begins there
    assert torch.equal(other.words, layout.words)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
def test_offsets_are_where_the_values_of_a_turn_begin(
    wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(bitmap_layout, "_WIDE", 1)
    dense = any_matrix(7, 600, torch.float16)
    layout = pack_bitmap(pack(dense))
    assert layout.offsets is not None
    assert layout.offsets.dtype == (torch.int64 if wide else torch.int32)
    for row in range(7):
        for turn in range(3):
            before = (dense[:row] != 0).sum() + (dense[row, : turn * 256] != 0).sum()
            assert layout.offsets[row, turn] == before


def test_ones_are_counted() -> None:
    words = torch.randint(-(2**31), 2**31, (1000,), dtype=torch.int64)
    words = torch.cat([words, torch.tensor([0, -1, -(2**31), 2**31 - 1])]).to(torch.int32)
    assert ones(words).tolist() == [(word & 0xFFFFFFFF).bit_count() for word in words.tolist()]


@pytest.mark.parametrize(
    ("packed", "n", "message"),
    [
        (pack(torch.zeros(2, 2, 32)), 0, r"\[2, 2, 32\]"),
        (pack(torch.zeros(2, 0)), 0, "no weights"),
        (replace(pack(torch.ones(2, 32)), values=torch.ones(63)), 0, "64 one bits"),
        (replace(pack(torch.ones(2, 32)), values=torch.ones(64).double()), 0, "float64"),
        (pack(torch.zeros(2, 64)), 16, "float32"),
        (pack(torch.zeros(2, 64).bfloat16()), 30, "30:32 takes no less"),
        (pack(torch.zeros(2, 60).bfloat16()), 16, "multiple of 32 weights, got 60"),
        (pack(torch.ones(2, 64).bfloat16()), 16, "not 16:32: 4 of 4 groups keep more than 16"),
    ],
)
def test_what_it_cannot_pack_is_refused(packed: Packed, n: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_exact(packed, n) if n else pack_bitmap(packed)


def test_what_does_not_fit_the_matrix_is_refused() -> None:
    layout = layout_of(torch.zeros(3, 8).bfloat16())
    for x, bias, message in [
        (torch.zeros(17, 8).bfloat16(), None, r"\[17, 8\]"),
        (torch.zeros(0, 8).bfloat16(), None, r"\[0, 8\]"),
        (torch.zeros(1, 4).bfloat16(), None, r"\[1, 4\]"),
        (torch.zeros(1, 8).half(), None, "float16"),
        (torch.zeros(1, 8, device="meta").bfloat16(), None, "on meta"),
        (torch.zeros(1, 8).bfloat16(), torch.zeros(4), r"3 rows has shape \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            bitmap_gemv(x, layout, bias)


# Interpreted, a turn of a program takes about half a second. So each case stands for what only it has.
CASES = {  # tokens, rows, columns, n of 32 or 0, warps, split
    "one token, two turns": (1, 16, 512, 0, 1, 1, torch.bfloat16),
    "one row, one column": (1, 1, 1, 0, 1, 1, torch.float16),
    "two tokens, ragged": (2, 19, 300, 0, 2, 1, torch.float16),
    "float32, fewer turns than warps": (3, 5, 31, 0, 4, 1, torch.float32),
    "eight tokens, split": (8, 9, 700, 0, 2, 2, torch.bfloat16),
    "sixteen tokens": (16, 8, 256, 0, 1, 1, torch.float16),
    "nine tokens": (9, 5, 100, 0, 2, 1, torch.bfloat16),
    "16:32": (1, 17, 512, 16, 2, 1, torch.bfloat16),
    "9:32, split unevenly": (5, 3, 736, 9, 1, 2, torch.float16),
    "29:32": (1, 2, 32, 29, 1, 1, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_the_product_is_that_of_float64(
    case: str, device: torch.device, poisoned: Unwritten
) -> None:
    tokens, rows, columns, n, warps, split, dtype = CASES[case]
    dense = (
        nm_matrix(rows, columns, n, 32, dtype, "fewer") if n else any_matrix(rows, columns, dtype)
    )
    dense = dense.to(device)
    layout = layout_of(dense, n)
    parts = {"values": layout.values, "words": layout.words, "offsets": layout.offsets}
    apart = {name: amid_poison(part) for name, part in parts.items() if part is not None}
    layout = replace(layout, **apart)
    torch.manual_seed(0)
    x = amid_poison(torch.randn(tokens, columns).to(device, dtype))
    bias = amid_poison(torch.randn(rows).to(device, dtype)) if tokens % 2 else None
    y = bitmap_gemv(x, layout, bias, warps=warps, split=split)
    assert poisoned(y) == 0
    exactly = truth(x, dense, bias)
    assert_within(y, *exactly)
    assert_within(bitmap_gemv_reference(x, layout, bias), *exactly)


def test_values_of_other_columns_do_not_show(device: torch.device) -> None:
    """A lane looks at four values, whatever they are, and takes those that its bits name."""
    dense = torch.zeros(4, 256, device=device).bfloat16()
    dense[0, ::2] = float("nan")
    dense[1, 1::3] = float("inf")
    dense[2, 255] = 2
    dense[3, 0] = float("nan")  # lies behind the values of the row before
    x = torch.ones(1, 256, device=device).bfloat16()
    y = bitmap_gemv(x, layout_of(dense), warps=1, split=1)[0]
    assert y[0].isnan()
    assert y[1] == float("inf")
    assert y[2] == 2
    assert y[3].isnan()


def test_offsets_of_64_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = any_matrix(4, 300, torch.bfloat16).to(device)
    x = torch.randn(1, 300).bfloat16().to(device)
    y = bitmap_gemv(x, layout_of(dense), warps=1)
    monkeypatch.setattr(bitmap_layout, "_WIDE", 1)
    assert torch.equal(bitmap_gemv(x, layout_of(dense), warps=1), y)


@pytest.mark.parametrize("n", [0, 10])
def test_the_trial_finds_a_wrong_product(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert bitmap.unavailable(cpu, n) == "needs an NVIDIA GPU"

    def right(x: Tensor, layout: BitmapLayout, bias: Tensor, **launch: int) -> Tensor:
        return bitmap_gemv_reference(x, layout, bias)

    monkeypatch.setattr(bitmap, "bitmap_gemv", right)
    assert bitmap._wrong(cpu, n) is None
    monkeypatch.setattr(bitmap, "bitmap_gemv", lambda *a, **k: right(*a, **k) * 1.1)
    said = f"1 tokens, {n or 'any'} of 32, [32, 1024] torch.bfloat16"
    assert bitmap._wrong(cpu, n) == said


@cache
def layer_on_gpu(shape: tuple[int, int], n: int) -> tuple[Tensor, BitmapLayout]:
    """Once for all numbers of tokens."""
    dense = nm_matrix(*shape, n or 16, 32, torch.bfloat16, device="cuda")
    if not n:
        dense *= torch.rand(shape, device="cuda") < 0.9
    layout = layout_of(dense, n)
    assert torch.equal(unpack(layout.packed), dense)
    return dense, layout


@pytest.mark.gpu
@pytest.mark.parametrize("n", [0, 16, 10])
@pytest.mark.parametrize("tokens", [t for t in TOKENS_ON_GPU if t <= 16])
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (11008, 4000)], **ids)
def test_on_a_gpu_at_the_size_of_a_layer(
    shape: tuple[int, int], tokens: int, n: int, poisoned: Unwritten
) -> None:
    """The twin of the interpreted test, a hundred times the same."""
    dense, layout = layer_on_gpu(shape, n)
    x = torch.randn(tokens, shape[1], device="cuda").bfloat16()
    bias = torch.randn(shape[0], device="cuda").bfloat16()
    for shift in (None, bias):
        y = bitmap_gemv(x, layout, shift)
        assert poisoned(y) == 0
        assert_as_good_as_dense(y, x, dense, shift)
        for _ in range(100):
            assert torch.equal(bitmap_gemv(x, layout, shift), y)
