"""The n:8 product on tensor cores: its packing bit for bit, its own source run by an emulator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import INTERPRETED
from gluon_on_cpu import LANES, inline_asm, on_cpu
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
from ptx import mad_lo, mma_m16n8k16, prmt, shl, shr
from torch import Tensor

from llmprune.kernels import measure
from llmprune.kernels import n8_mma as n8
from llmprune.kernels import slots as slots_module
from llmprune.kernels.expanding import from_n8
from llmprune.kernels.held import N8
from llmprune.kernels.n8_layout import KEPT, N8Layout, dense_n8, pack_n8, unpack_n8
from llmprune.kernels.packed import pack, unpack

Unwritten = Callable[[Tensor], int]
HALVES = (torch.bfloat16, torch.float16)
ids = {"ids": lambda value: str(value).removeprefix("torch.")}


@pytest.fixture
def emulated(root: Path) -> Iterator[ModuleType]:
    if not INTERPRETED:
        pytest.skip("the kernel that adds the parts of a split is compiled here, not interpreted")
    kernels = root / "kernels"
    with on_cpu(kernels / "s24_gluon.py", kernels / "n8_gluon.py") as module:
        yield module


def matrix(rows: int, columns: int, n: int, dtype: torch.dtype, mask: str = "random") -> Tensor:
    return nm_matrix(rows, columns, n, 8, dtype, mask)


def every_mask(n: int, dtype: torch.dtype) -> Tensor:
    """[32, 512]: groups that keep each set of at most n columns, of any bits, NaN and zeros among them."""
    random = torch.Generator().manual_seed(n)
    masks = torch.arange(2048) % 256
    masks = masks[torch.randperm(2048, generator=random)]
    keep = (masks[:, None] >> torch.arange(8)) & 1 == 1
    keep &= keep.cumsum(1) <= n
    words = torch.randint(-(2**15), 2**15, keep.shape, generator=random, dtype=torch.int16)
    words[::5, ::3] = -(2**15)  # minus zero
    return torch.where(keep, words, 0).view(dtype).reshape(32, 512)


# Packing


@pytest.mark.parametrize("n", KEPT)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 8), (16, 256), (37, 304), (64, 520)], **ids)
def test_what_is_packed_comes_back(shape: tuple[int, int], mask: str, n: int) -> None:
    dense = matrix(*shape, n, HALVES[shape[0] % 2], mask)
    layout = pack_n8(pack(dense), n)
    back = unpack_n8(layout)
    assert torch.equal(bits(unpack(back)), bits(dense))
    assert torch.equal(back.bitmap, pack(dense).bitmap)
    slots = dense_n8(layout, ones=True)
    assert ((slots == 1) | (slots == 0)).all()
    assert (slots.reshape(-1, 8).float().sum(1) == n).all()  # short groups are filled up
    assert (slots[dense != 0] == 1).all()


@pytest.mark.parametrize("n", KEPT)
@pytest.mark.parametrize("dtype", HALVES, **ids)
def test_every_mask_and_any_bits_survive(
    n: int, dtype: torch.dtype, device: torch.device, poisoned: Unwritten
) -> None:
    """Both ways to expand: plain torch, and by Triton."""
    dense = every_mask(n, dtype).to(device)
    layout = pack_n8(pack(dense), n)
    layout = N8Layout(amid_poison(layout.words), layout.shape, layout.dtype, n)
    assert torch.equal(bits(dense_n8(layout)), bits(dense))
    assert torch.equal(bits(from_n8(layout)), bits(dense))


@pytest.mark.parametrize("n", KEPT)
def test_by_triton_where_no_tile_divides(n: int, device: torch.device, poisoned: Unwritten) -> None:
    dense = matrix(37, 264, n, torch.bfloat16, "fewer").to(device)
    assert torch.equal(bits(from_n8(pack_n8(pack(dense), n))), bits(dense))


def test_what_is_laid_out_for_measuring_is_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of rows over and over, at a number of rows that no block divides."""
    monkeypatch.setattr(measure, "_BLOCK", 64 * 304)
    bench = measure.Bench(N8(3), torch.device("cpu"), (150, 304), torch.bfloat16)
    assert bench.words[0].shape == (10, 2, 7, 32, 4)
    assert torch.equal(
        dense_n8(N8Layout(bench.words[0], (150, 304), torch.bfloat16, 3)), bench.dense[0]
    )
    assert {split for _, split in bench.launches()} == {None, 1, 2}


def test_in_blocks_of_rows_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(matrix(150, 512, 3, torch.float16))
    whole = pack_n8(packed, 3)
    monkeypatch.setattr(slots_module, "BLOCK", 32 * 512)
    assert torch.equal(pack_n8(packed, 3).words, whole.words)
    assert torch.equal(dense_n8(whole), unpack(packed))


@pytest.mark.parametrize(("n", "taken"), [(2, 5), (3, 7), (4, 9)])
def test_bits_per_weight(n: int, taken: int) -> None:
    assert pack_n8(pack(matrix(64, 1024, n, torch.bfloat16)), n).bytes * 8 == taken * 64 * 1024


@pytest.mark.parametrize("n", KEPT)
def test_each_word_is_where_a_lane_looks(n: int) -> None:
    """Brute force, from the words that the docstring of the layout promises."""
    dense = every_mask(n, torch.float16)[:17]
    words = pack_n8(pack(dense), n).words
    found = torch.zeros(17, 512, dtype=torch.int16)
    for row in range(17):
        for group in range(64):
            chunk, (step, t) = group // 32, divmod(group % 32, 4)
            of_lane = words[row // 16, chunk, :, row % 8 * 4 + t]  # [1 + 2n, 4]
            numbers = of_lane[1:].flatten().view(torch.int16)[2 * n * step :][: 2 * n]
            lower = row // 8 % 2
            slots = numbers[n * lower :][:n].tolist()
            if n == 3:
                slots = numbers[[(3, 0, 1), (2, 4, 5)][lower],].tolist()
            for half in range(2):
                for i in range(4):
                    bit = 8 * i + 4 * (step % 2) + 2 * lower + half
                    if int(of_lane[0, step // 2]) >> bit & 1:
                        found[row, 8 * group + 4 * half + i] = slots.pop(-1 if half else 0)
            assert not slots
    assert torch.equal(found, dense.view(torch.int16))


def test_what_it_does_not_take_is_refused() -> None:
    layout = pack_n8(pack(torch.zeros(3, 16).bfloat16()), 4)
    for x, bias, message in [
        (torch.zeros(65, 16).bfloat16(), None, r"\[65, 16\]"),
        (torch.zeros(0, 16).bfloat16(), None, r"\[0, 16\]"),
        (torch.zeros(1, 8).bfloat16(), None, r"\[1, 8\]"),
        (torch.zeros(1, 16).half(), None, "float16"),
        (torch.zeros(1, 16, device="meta").bfloat16(), None, "on meta"),
        (torch.zeros(1, 16).bfloat16(), torch.zeros(4), r"3 rows has shape \[4\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            n8.n8_mma(x, layout, bias)
    for dense, n, message in [
        (torch.ones(2, 16).bfloat16(), 4, "not 4:8: 4 of 4 groups keep more than 4"),
        (torch.zeros(2, 12).bfloat16(), 3, "multiple of 8 weights, got 12"),
        (torch.zeros(2, 8).bfloat16(), 5, "got 5:8"),
        (torch.zeros(2, 8), 2, "float32"),
        (torch.zeros(2, 2, 8).bfloat16(), 2, r"\[2, 2, 8\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_n8(pack(dense), n)


# The emulator


def test_the_emulated_instructions() -> None:
    """By hand, from the PTX ISA."""

    def word(number: int) -> Tensor:
        return torch.tensor(number, dtype=torch.int64).to(torch.int32)

    a, b = word(0x80112233), word(0x445566F7)
    for selectors, expected in [
        (0x3210, 0x80112233),
        (0x7654, 0x445566F7),
        (0x12345670, 0x66554433),  # what is above 16 bits is not looked at
        (0x9BC0, 0x00FFFF33),  # signs of bytes 1, 3 and 4, and byte 0
    ]:
        assert prmt(a, b, word(selectors)) == word(expected)
    assert mad_lo(word(0xFFFFFFFF), word(0xFFFFFFFF), word(5)) == 6
    # the selectors of n8_mma: of four columns 0, 1 and 3 are kept
    assert mad_lo(word(0x01000101), word(0x22222200), word(0x10101010)) == word(0x54543210)
    assert shl(word(0x80000001), word(1)) == 2
    assert shl(word(1), word(40)) == 0
    assert shr(word(0x80000000), word(31)) == 1


def test_the_emulated_product_of_tensor_cores() -> None:
    """`mma_m16n8k16` on fragments written down by hand: row 9, columns 3 and 10, token 6."""
    a, b = torch.zeros(32, 8), torch.zeros(32, 4)
    # Row 9: lanes g = 1. Column 3: t = 1, second of register 1; column 10: t = 1, first of register 3.
    a[4 * 1 + 1, 3], a[4 * 1 + 1, 6] = 2.0, 3.0
    # Token 6: lanes g = 6. Column 3: t = 1, second of register 0; column 10: t = 1, first of register 1.
    b[4 * 6 + 1, 1], b[4 * 6 + 1, 2] = 10.0, 100.0
    a, b = (m.half().view(torch.int32) for m in (a, b))
    d = mma_m16n8k16(a, b, torch.zeros(32, 4), torch.float16)
    # Row 9, token 6: lane g = 1, t = 3, third sum.
    assert d.nonzero().tolist() == [[4 * 1 + 3, 2]]
    assert d[4 * 1 + 3, 2] == 2 * 10 + 3 * 100


@pytest.mark.parametrize("n", KEPT)
def test_a_lane_decodes_its_groups_bit_for_bit(n: int, emulated: ModuleType) -> None:
    """Every mask, NaN with its payload: the fragments are the columns of the groups in natural order."""
    dense = every_mask(n, torch.bfloat16)
    words = pack_n8(pack(dense), n).words  # [2, 2, 1 + 2n, 32, 4]
    g, t = LANES // 4, LANES % 4
    for step in range(8):
        first, last = (1 + at // 4 for at in (step * n, step * n + n - 1))
        fragments = inline_asm(
            emulated._decode(step, n),
            ",".join(["=&r"] * 8 + ["r"] * 12),
            [words[:, :, first], words[:, :, last], words[:, :, 0]],
            (torch.int32, torch.int32),
            is_pure=True,
            pack=4,
        )
        for i, register in ((i, register) for i in range(2) for register in range(4)):
            given = fragments[i][..., register].contiguous().view(torch.bfloat16)
            given = given.reshape(2, 2, 32, 2)
            column = 32 * step + 8 * t + 4 * i + 2 * (register // 2)
            wanted = dense.reshape(2, 16, 2, 256).transpose(1, 2)
            wanted = wanted[
                :, :, (g + 8 * (register % 2))[:, None], column[:, None] + torch.arange(2)
            ]
            assert torch.equal(bits(given), bits(wanted))


CASES = {
    "one token": (1, 32, 256, 4, 1, 1),
    "one row, one group": (1, 1, 8, 3, 2, 1),
    "two tokens, two chunks": (2, 32, 512, 2, 2, 1),
    "seven tokens, ragged": (7, 37, 304, 3, 2, 1),
    "nine tokens, chunks left over": (9, 48, 1280, 4, 4, 1),
    "17 tokens": (17, 16, 256, 2, 1, 1),
    "64 tokens": (64, 33, 264, 3, 2, 1),
    "16 tokens, two warps on the same columns": (16, 64, 512, 4, 4, 1),
    "33 tokens, four warps on the same columns, ragged": (33, 250, 776, 3, 8, 2),
    "17 tokens, rows for two warps only": (17, 192, 304, 4, 8, 1),
    "split": (3, 40, 1024, 3, 2, 2),
    "split, ragged, a part without columns": (8, 40, 1304, 2, 2, 5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("emulated")
def test_the_product_is_that_of_float64(case: str, poisoned: Unwritten) -> None:
    tokens, rows, columns, n, warps, split = CASES[case]
    torch.manual_seed(0)
    dtype = HALVES[rows // 2 % 2]
    dense = matrix(rows, columns, n, dtype, "fewer")
    layout = pack_n8(pack(dense), n)
    layout = N8Layout(amid_poison(layout.words), layout.shape, layout.dtype, n)
    x = amid_poison(torch.randn(tokens, columns).to(dtype) / columns**0.5)
    bias = torch.randn(rows).to(dtype) if tokens % 2 else None
    exact = truth(x, dense, bias)
    y = n8.n8_mma(x, layout, bias, warps=warps, split=split)
    assert poisoned(y) == 0
    assert_within(y, *exact)
    assert_within(n8.n8_mma_reference(x, layout, bias), *exact)


@pytest.mark.parametrize("n", KEPT)
@pytest.mark.usefixtures("emulated")
def test_infinite_and_nan_weights_show_in_their_row_alone(n: int) -> None:
    dense = matrix(24, 256, n, torch.bfloat16)
    dense[3].masked_fill_(dense[3] != 0, float("inf"))
    dense[9].masked_fill_(dense[9] != 0, float("nan"))
    y = n8.n8_mma(torch.ones(1, 256).bfloat16(), pack_n8(pack(dense), n), warps=1)
    assert y[0, 3] == float("inf")
    assert y[0].isnan().nonzero().tolist() == [[9]]


@pytest.mark.usefixtures("emulated")
def test_inputs_and_bias_on_any_address() -> None:
    layout = pack_n8(pack(matrix(16, 256, 4, torch.bfloat16)), 4)
    x = torch.randn(3 * 256 + 1).bfloat16()[1:].reshape(3, 256)
    assert x.data_ptr() % 16
    plain = n8.n8_mma(x.clone(), layout, warps=1)
    assert torch.equal(n8.n8_mma(x, layout, warps=1), plain)
    assert torch.equal(n8.n8_mma(x.T.contiguous().T, layout, warps=1), plain)
    bias = torch.randn(2, 16).T  # neighbours lie two apart
    shifted = [n8.n8_mma(x, layout, b, warps=1) for b in (bias[:, 0], bias[:, 0].clone())]
    assert torch.equal(*shifted)
    assert not torch.equal(shifted[0], plain)


def test_without_a_gpu_it_says_so() -> None:
    assert n8.unavailable(torch.device("cpu"), 4) == "needs an NVIDIA GPU"


def test_the_trial_before_use_finds_a_wrong_kernel(
    emulated: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    assert n8._wrong(cpu, 3) is None
    right = emulated._decode
    monkeypatch.setattr(emulated, "_decode", lambda step, n: right(step ^ 2, n))
    assert n8._wrong(cpu, 4) == "[1, 2048] x [32, 2048] 4:8 torch.bfloat16"


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("n", KEPT)
def test_this_gpu_passes_the_trial(n: int) -> None:
    assert n8.unavailable(torch.device("cuda", torch.cuda.current_device()), n) is None


@cache
def layer_on_gpu(shape: tuple[int, int], n: int, dtype: torch.dtype) -> tuple[Tensor, N8Layout]:
    """Once for all numbers of tokens."""
    dense = nm_matrix(*shape, n, 8, dtype, device="cuda")
    layout = pack_n8(pack(dense), n)
    assert torch.equal(bits(dense_n8(layout)), bits(dense))
    assert torch.equal(bits(from_n8(layout)), bits(dense))
    return dense, layout


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS_ON_GPU)
@pytest.mark.parametrize("shape", [(4096, 14336), (1024, 4096), (11000, 4104)], **ids)
@pytest.mark.parametrize("dtype", HALVES, **ids)
@pytest.mark.parametrize("n", KEPT)
def test_on_a_gpu_at_the_size_of_a_layer(
    n: int, dtype: torch.dtype, shape: tuple[int, int], tokens: int, poisoned: Unwritten
) -> None:
    """The twin of the emulated test, a hundred times the same."""
    dense, layout = layer_on_gpu(shape, n, dtype)
    x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
    bias = torch.randn(shape[0], device="cuda").to(dtype)
    for shift in (None, bias):
        y = n8.n8_mma(x, layout, shift)
        assert poisoned(y) == 0
        assert_as_good_as_dense(y, x, dense, shift)
        for _ in range(100):
            assert torch.equal(n8.n8_mma(x, layout, shift), y)
